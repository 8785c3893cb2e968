"""What a worker settles on, from what it probed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.training.memory_budget import (
    BYTES_PER_SLOT_WEIGHT,
    MAX_KNEE_TOKENS,
    MAX_SLOTS,
    MIN_KNEE_TOKENS,
    Probed,
    Room,
    choose_packing,
    fit_room,
)

GIB = 1 << 30
ROOMS = st.builds(
    Room,
    fixed_seconds=st.floats(0, 1),
    seconds_per_token=st.floats(0, 1e-3),
    fixed_bytes=st.floats(0, 20 * GIB),
    bytes_per_token=st.floats(0, 2**22),
)
CHOICES = st.fixed_dictionaries(
    {
        "limit_bytes": st.integers(GIB, 80 * GIB),
        "slot_weights": st.integers(1000, 200_000_000),
        "update_tokens": st.integers(1, 20_000),
        "longest_row": st.integers(1, 4096),
        "trials": st.integers(1, 64),
    }
)


def test_lines_are_found_again() -> None:
    tokens = (512, 2048, 8192)
    probed = Probed(
        tokens, tuple(0.02 + 1e-5 * t for t in tokens), tuple(3 * GIB + 100_000 * t for t in tokens)
    )
    room = fit_room(probed)
    assert room.fixed_seconds == pytest.approx(0.02)
    assert room.seconds_per_token == pytest.approx(1e-5)
    assert room.fixed_bytes == pytest.approx(3 * GIB)
    assert room.bytes_per_token == pytest.approx(100_000)
    assert room.knee_tokens == 9 * 2000


@given(
    tokens=st.lists(st.integers(1, 10_000), min_size=1, max_size=4, unique=True).map(sorted),
    data=st.data(),
)
def test_no_cost_is_below_nothing(tokens: list[int], data: st.DataObject) -> None:
    costs = st.lists(st.floats(0, 1e9), min_size=len(tokens), max_size=len(tokens))
    room = fit_room(Probed(tuple(tokens), tuple(data.draw(costs)), tuple(int(c) for c in data.draw(costs))))
    assert min(room.fixed_seconds, room.seconds_per_token, room.fixed_bytes, room.bytes_per_token) >= 0
    assert MIN_KNEE_TOKENS <= room.knee_tokens <= MAX_KNEE_TOKENS


@given(room=ROOMS, choice=CHOICES)
def test_what_is_chosen_fits_and_is_no_more_than_asked_for(room: Room, choice: dict[str, int]) -> None:
    packing = choose_packing(room, **choice)
    assert 1 <= packing.slots <= min(choice["trials"], MAX_SLOTS)
    assert packing.pass_tokens >= choice["longest_row"]
    assert packing.slots == 1 or (packing.slots - 1) * choice["update_tokens"] < room.knee_tokens
    if packing.slots > 1:
        peak = room.peak_bytes(
            slots=packing.slots, slot_weights=choice["slot_weights"], pass_tokens=packing.pass_tokens
        )
        assert peak <= choice["limit_bytes"] + 1 + 1e-6 * peak


@given(room=ROOMS, choice=CHOICES, more=st.integers(0, 80 * GIB))
def test_more_memory_never_means_fewer_slots(room: Room, choice: dict[str, int], more: int) -> None:
    larger = choice | {"limit_bytes": choice["limit_bytes"] + more}
    assert choose_packing(room, **larger).slots >= choose_packing(room, **choice).slots


def test_long_updates_need_no_company_and_short_ones_do() -> None:
    room = Room(fixed_seconds=0.03, seconds_per_token=3e-5, fixed_bytes=3 * GIB, bytes_per_token=2**19)
    common = {"limit_bytes": 70 * GIB, "slot_weights": 12_000_000, "longest_row": 512, "trials": 16}
    assert room.knee_tokens == 9000
    assert choose_packing(room, update_tokens=1024, **common).slots == 9
    assert choose_packing(room, update_tokens=16_384, **common).slots == 1
    assert choose_packing(room, update_tokens=64, **common).slots == MAX_SLOTS


def test_adapters_too_large_for_memory_share_it_with_fewer() -> None:
    room = Room(fixed_seconds=0.03, seconds_per_token=3e-5, fixed_bytes=3 * GIB, bytes_per_token=2**19)
    weights = 40_000_000
    limit = 3 * GIB + 4 * weights * BYTES_PER_SLOT_WEIGHT + 4 * 512 * 2**19
    packing = choose_packing(
        room, limit_bytes=limit, slot_weights=weights, update_tokens=64, longest_row=512, trials=16
    )
    assert packing.slots == 4
    assert packing.pass_tokens == 4 * 512
