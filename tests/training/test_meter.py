from __future__ import annotations

import json

import pytest
import torch

from tuner.records import Measured, Throughput, event_from_json, event_to_json
from tuner.training.worker_state import Meter

CPU = torch.device("cpu")


def test_what_is_read_later_is_of_the_same_session_and_holds_what_was_before() -> None:
    meter = Meter()
    first = meter.read(CPU)
    meter.count_pass(micro_steps=3, tokens=50, padded_tokens=60)
    meter.count_pass(micro_steps=1, tokens=10, padded_tokens=20)
    with meter.timing("training"):
        pass
    second = meter.read(CPU)
    assert second.session == first.session != ""
    assert (second.passes, second.micro_steps, second.tokens, second.padded_tokens) == (2, 4, 60, 80)
    assert (second.packing_factor, second.padding_share) == (2.0, pytest.approx(0.25))
    assert second.training_seconds > first.training_seconds == 0.0
    assert second.peak_memory_bytes >= first.peak_memory_bytes > 0


def test_two_lives_are_two_sessions() -> None:
    assert len({Meter().session for _ in range(3)}) == 3


def test_what_was_measured_passes_the_pipe_whole() -> None:
    said = Measured(Throughput("1-2", 0.1 + 0.2, 1 / 3, 5e-324, 1, 2, 3, 2**60, 2**61, 7))
    assert event_from_json(json.loads(json.dumps(event_to_json(said)))) == said
