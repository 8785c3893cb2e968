"""What a worker settles on, from what it probed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import ModelError
from tuner.training.memory_budget import (
    BYTES_PER_SLOT_WEIGHT,
    MAX_KNEE_TOKENS,
    MAX_SLOTS,
    MIN_KNEE_TOKENS,
    DeviceRoom,
    PassCost,
    Probed,
    choose_on_each,
    choose_packing,
    explain_out_of_memory,
    fit_pass_cost,
)

GIB = 1 << 30
COSTS = st.builds(
    PassCost,
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
    cost = fit_pass_cost(probed)
    assert cost.fixed_seconds == pytest.approx(0.02)
    assert cost.seconds_per_token == pytest.approx(1e-5)
    assert cost.fixed_bytes == pytest.approx(3 * GIB)
    assert cost.bytes_per_token == pytest.approx(100_000)
    assert cost.knee_tokens == 9 * 2000


@given(
    tokens=st.lists(st.integers(1, 10_000), min_size=1, max_size=4, unique=True).map(sorted),
    data=st.data(),
)
def test_no_cost_is_below_nothing(tokens: list[int], data: st.DataObject) -> None:
    costs = st.lists(st.floats(0, 1e9), min_size=len(tokens), max_size=len(tokens))
    cost = fit_pass_cost(
        Probed(tuple(tokens), tuple(data.draw(costs)), tuple(int(c) for c in data.draw(costs)))
    )
    assert min(cost.fixed_seconds, cost.seconds_per_token, cost.fixed_bytes, cost.bytes_per_token) >= 0
    assert MIN_KNEE_TOKENS <= cost.knee_tokens <= MAX_KNEE_TOKENS


@given(cost=COSTS, choice=CHOICES)
def test_what_is_chosen_fits_and_is_no_more_than_asked_for(cost: PassCost, choice: dict[str, int]) -> None:
    packing = choose_packing(cost, **choice)
    assert 1 <= packing.slots <= min(choice["trials"], MAX_SLOTS)
    assert packing.pass_tokens >= choice["longest_row"]
    assert packing.slots == 1 or (packing.slots - 1) * choice["update_tokens"] < cost.knee_tokens
    if packing.slots > 1:
        peak = cost.peak_bytes(
            slots=packing.slots, slot_weights=choice["slot_weights"], pass_tokens=packing.pass_tokens
        )
        assert peak <= choice["limit_bytes"] + 1 + 1e-6 * peak


@given(cost=COSTS, choice=CHOICES, more=st.integers(0, 80 * GIB))
def test_more_memory_never_means_fewer_slots(cost: PassCost, choice: dict[str, int], more: int) -> None:
    larger = choice | {"limit_bytes": choice["limit_bytes"] + more}
    assert choose_packing(cost, **larger).slots >= choose_packing(cost, **choice).slots


def test_long_updates_need_no_company_and_short_ones_do() -> None:
    cost = PassCost(fixed_seconds=0.03, seconds_per_token=3e-5, fixed_bytes=3 * GIB, bytes_per_token=2**19)
    common = {"limit_bytes": 70 * GIB, "slot_weights": 12_000_000, "longest_row": 512, "trials": 16}
    assert cost.knee_tokens == 9000
    assert choose_packing(cost, update_tokens=1024, **common).slots == 9
    assert choose_packing(cost, update_tokens=16_384, **common).slots == 1
    assert choose_packing(cost, update_tokens=64, **common).slots == MAX_SLOTS


def test_adapters_too_large_for_memory_share_it_with_fewer() -> None:
    cost = PassCost(fixed_seconds=0.03, seconds_per_token=3e-5, fixed_bytes=3 * GIB, bytes_per_token=2**19)
    weights = 40_000_000
    limit = 3 * GIB + 4 * weights * BYTES_PER_SLOT_WEIGHT + 4 * 512 * 2**19
    packing = choose_packing(
        cost, limit_bytes=limit, slot_weights=weights, update_tokens=64, longest_row=512, trials=16
    )
    assert packing.slots == 4
    assert packing.pass_tokens == 4 * 512


@given(costs=st.lists(COSTS, min_size=1, max_size=3), choice=CHOICES, data=st.data())
def test_the_fullest_device_decides(
    costs: list[PassCost], choice: dict[str, int], data: st.DataObject
) -> None:
    seconds = {name: getattr(costs[0], name) for name in ("fixed_seconds", "seconds_per_token")}
    costs = [replace(cost, **seconds) for cost in costs]  # all take part in one pass
    of_device = {name: choice.pop(name) for name in ("limit_bytes", "slot_weights")}
    limits = data.draw(st.permutations([of_device["limit_bytes"] // (n + 1) for n in range(len(costs))]))
    rooms = [
        DeviceRoom(cost, limit_bytes=limit, slot_weights=of_device["slot_weights"])
        for cost, limit in zip(costs, limits, strict=True)
    ]
    found = choose_on_each(rooms, **choice)
    alone = [choose_on_each([room], **choice) for room in rooms]
    first = choose_packing(costs[0], limit_bytes=limits[0], slot_weights=of_device["slot_weights"], **choice)
    assert alone[0] == first
    assert found.slots == min(packing.slots for packing in alone)
    for cost, limit in zip(costs, limits, strict=True):
        peak = cost.peak_bytes(
            slots=found.slots, slot_weights=of_device["slot_weights"], pass_tokens=found.pass_tokens
        )
        assert found.slots == 1 or peak <= limit + 1 + 1e-6 * peak


def test_memory_that_runs_out_on_a_cpu_is_explained() -> None:
    """As for a rank with a few zeros too many: torch's CPU says it as another error than its GPUs."""
    with pytest.raises(ModelError, match="memory has no room"), explain_out_of_memory(1):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 29184 bytes")
