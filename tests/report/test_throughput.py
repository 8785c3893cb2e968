from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.records import NodeChange, Throughput, added_up
from tuner.records.throughput import by_node
from tuner.report import format

from . import synthetic


def test_workers_are_added_up_before_anything_is_divided() -> None:
    whole = added_up(synthetic.WORK)
    assert whole is not None
    assert format.throughput_rows(whole) == [
        ("tokens/s", "3,000", "training tokens per second of a worker's training time"),
        ("trial-steps/s", "2", "updates of all trials per second of a worker's training time"),
        ("packing factor", "3.5", "average number of trials in a training pass"),
        ("padding", "20%", "share of the tokens computed in training"),
        ("evaluation", "30%", "share of the time for training, evaluation and saving"),
        ("peak memory", "3.0 GB", "maximum over the workers"),
    ]
    assert format.throughput_line(whole) == (
        "3,000 tokens/s, 2 trial-steps/s, packing factor 3.5, padding 20%, evaluation 30%, peak memory 3.0 GB"
    )


def test_of_nothing_there_is_nothing_to_say() -> None:
    assert added_up(()) is None
    assert format.throughput_rows(None) == []


def test_a_worker_that_only_evaluated_has_no_rates() -> None:
    only = Throughput("1-1", evaluating_seconds=2.0, peak_memory_bytes=5_000_000)
    assert format.throughput_line(only) == "evaluation 100%, peak memory 5.0 MB"


@pytest.mark.parametrize(("tokens", "text"), [(12, "1.2"), (4_567, "457"), (45_670, "4,567"), (0, "0")])
def test_rates_have_the_digits_that_count(tokens: int, text: str) -> None:
    assert format.throughput_rows(Throughput("a", 10.0, tokens=tokens))[0][1] == text


def test_of_a_cluster_each_node_has_a_line() -> None:
    """By the name that the parent puts before a worker's session."""
    first, second = synthetic.WORK
    parts = [replace(first, session="gpu-1/1-1"), replace(second, session="gpu-2/2-1"), synthetic.WORK[0]]
    nodes = by_node(parts)
    assert list(nodes) == ["gpu-1", "gpu-2"]
    rows = format.throughput_rows(added_up(parts), nodes)
    assert rows[-2:] == [
        ("tokens/s on gpu-1", "3,000", "of a worker there; 33% of all updates"),
        ("tokens/s on gpu-2", "3,000", "of a worker there; 33% of all updates"),
    ]
    assert by_node(synthetic.WORK) == {}
    gone = [NodeChange("gpu-2", "joined", 1, 7.0), NodeChange("gpu-2", "lost", 1, 8.0)]
    rows = format.throughput_rows(added_up(parts), nodes, gone)
    assert [meaning for _, _, meaning in rows[-2:]] == [
        "of a worker there; 33% of all updates",
        "of a worker there; 33% of all updates; left the cluster",
    ]


seconds = st.floats(0, 1e6)
counts = st.integers(0, 2**50)


@st.composite
def throughputs(draw: st.DrawFn) -> Throughput:
    padded = draw(counts)
    real = draw(st.integers(0, padded))
    return Throughput("a", draw(seconds), draw(seconds), draw(seconds), tokens=real, padded_tokens=padded)


@given(st.lists(throughputs(), max_size=4))
def test_shares_stay_shares(parts: list[Throughput]) -> None:
    whole = added_up(parts)
    shares = [] if whole is None else [whole.padding_share, whole.evaluation_share]
    for share in shares:
        assert share is None or 0.0 <= share <= 1.0
