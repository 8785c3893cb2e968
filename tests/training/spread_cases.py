"""A base model on two devices, both with numbers, trains as on one: to the digit, in the same files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.data.tiny import byte_level
from tests.second_device import DEVICE, move, second_device
from tests.training.driving import (
    DecidesOnDevice,
    Entry,
    assignment,
    curve,
    drive,
    ended,
    loss_difference,
    run_loop,
    started,
    worker_state,
)
from tuner.adapters import Base, PackedRows, load_base
from tuner.adapters.base import DTYPES, freeze, load_model
from tuner.adapters.generation import Decoding, TextGenerator
from tuner.adapters.placement import connect
from tuner.data import Prompt
from tuner.errors import ModelError
from tuner.records import Assignment, Event, Saved
from tuner.training import trial_run

PARTS = ("model.layers.1", "model.norm", "lm_head")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The backward pass of SiLU has one kernel on a CPU and several on other devices, with other last digits.
    return tiny.save_model(tmp_path_factory.mktemp("model"), tiny.config("llama", hidden_act="relu"))


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with second_device():
        yield


def on_one(path: Path) -> Base:
    return load_base(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)


def on_two(path: Path, parts: Sequence[str] = PARTS) -> Base:
    """The same base, placed by hand before it is examined."""
    model = load_model(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
    for name in parts:
        move(model.get_submodule(name))
    connect(model)
    return freeze(model, dtype=DTYPES["float32"])


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        pytest.param("adamw", PARTS, id="adamw, with the head"),
        pytest.param("muon", PARTS[:2], id="muon, without the head"),
    ],
)
def test_losses_and_weights(path: Path, parts: Sequence[str], optimizer: str) -> None:
    """Packed with dropout, a hole, ranks, clipping and micro-batches."""
    trials = [
        tiny.hyperparameters(
            training_seed=n, lora_r=4 + n, lora_dropout=0.1 * n, max_grad_norm=0.05, optimizer=optimizer
        )
        for n in range(3)
    ]
    found = []
    for base in (on_one(path), on_two(path, parts)):
        with worker_state(base, trials, slots=4, micro_tokens=80) as state:
            assert state.joins_rows
            assert state.base.last is not None
            entries = [Entry(0, 0), Entry(1, 1, micro_step=1), Entry(2, 3)]
            found.append(drive(state, trials, entries, max_train_steps=3))
    assert state.pack.devices == (CPU, DEVICE)
    assert len(state.pack.parts) == 2
    for n in range(3):
        one, two = (each[n] for each in found)
        assert one.losses == two.losses
        for name, pair in two.weights.items():
            there = {part.device for part in pair}
            assert there == {DEVICE if name.startswith("model.layers.1.") else CPU}
            assert all(torch.equal(a.cpu(), b) for a, b in zip(pair, one.weights[name], strict=True))


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.acceptance)])
def test_updates_that_the_first_device_decides(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For the second, too: batches of several sizes, one of them wild, as one device whose host decides."""
    trials = [
        tiny.hyperparameters(
            optimizer=kind, batch_size=size, training_seed=size, learning_rate=rate, max_grad_norm=0.05
        )
        for size, rate in ((4, 3e-3), (1, 1e-2), (2, 1e30))
    ]

    def events(base: Base, where: str) -> list[Event]:
        assigned = [
            assignment(tmp_path / where, n, hyperparameters=one, max_train_steps=end, evaluate_every=end)
            for n, (one, end) in enumerate(zip(trials, (4, 5, 6), strict=True))
        ]
        with worker_state(base, trials, slots=3, micro_tokens=30) as state:
            state.read_every_seconds, state.read_at = 3600.0, time.monotonic()
            return run_loop(state, assigned)

    host = events(on_one(path), "host")
    monkeypatch.setattr(trial_run, "TrialOptimizer", DecidesOnDevice)
    there = events(on_two(path), "there")
    for number in range(3):
        assert curve(there, number) == curve(host, number)
        assert ended(there, number) == ended(host, number)
    assert ended(there, 2).outcome == "infeasible"


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "muon", "use_dora": True}], ids=["adamw", "muon, DoRA"]
)
def test_a_checkpoint_resumes_on_any_number_of_devices(
    path: Path, tmp_path: Path, changes: dict[str, str | bool]
) -> None:
    """Evaluations, files and what resumes from them are those of one device."""
    trial = tiny.hyperparameters(lora_dropout=0.1, max_grad_norm=0.05, **changes)

    def assigned(name: str, **more: object) -> Assignment:
        steps = {"max_train_steps": 5, "evaluate_every": 2}
        return assignment(tmp_path / name, hyperparameters=trial, **steps, **more)

    bases = {"one": on_one(path), "two": on_two(path)}
    whole, last = {}, {}
    for name, base in bases.items():
        with worker_state(base, [trial]) as state:
            events = run_loop(state, [assigned(name)])
        assert ended(events).outcome == "complete"
        whole[name] = curve(events)
        with worker_state(base, [trial]) as state:
            events = run_loop(state, [assigned(f"{name}-half")], stop_at_micro_step=3)
        *_, saved = [event for event in events if isinstance(event, Saved)]
        last[name] = tmp_path / f"{name}-half" / saved.checkpoint.path
    assert whole["one"] == whole["two"]
    for file in ("optimizer.safetensors", "adapter_model.safetensors", "best.safetensors"):
        one, two = (load_file(last[name] / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    for name, other in (("one", "two"), ("two", "one")):
        resumed = assigned(f"{name}-resumed", resume_from=str(last[other]))
        with worker_state(bases[name], [trial]) as state:
            events = run_loop(state, [resumed])
        assert started(events).step > 0
        assert curve(events) == whole["one"]


def test_answers(path: Path) -> None:
    trial = tiny.hyperparameters(learning_rate=0.1)
    prompts = [Prompt(length, "", "", tuple(range(5, 5 + length))) for length in (4, 7)]
    said = []
    for base in (on_one(path), on_two(path)):
        with worker_state(base, [trial]) as state:
            drive(state, [trial], [Entry(0, 0)], max_train_steps=3)
            generator = TextGenerator(base, byte_level(), limited_by="--max-new-tokens")
            with state.pack.holding(PackedRows((0,))):
                said.append(generator.answers(base.model, prompts, Decoding(8)))
    assert said[0] == said[1]
    assert any(each.num_tokens for each in said[0])


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ("gpt2", ("transformer.h.1", "transformer.ln_f")),
        ("gemma2", ("model.layers.1", "model.norm")),
        ("qwen2", ("model.layers.0",)),
    ],
)
def test_other_models(models: tiny.Models, shape: tiny.Shape, parts: Sequence[str]) -> None:
    """Tied heads, a head that is not linear, a layer between others, and recomputed activations."""
    trial = tiny.hyperparameters(lora_dropout=0.1)
    found = []
    for base in (on_one(models.path(shape)), on_two(models.path(shape), parts)):
        assert base.keep_fewer_activations()
        with worker_state(base, [trial], slots=2) as state:
            found.append(drive(state, [trial], [Entry(0, 0)], max_train_steps=3)[0])
    assert loss_difference(*found) < 1e-5


def test_eva(path: Path) -> None:
    trial = tiny.hyperparameters(lora_init="eva", lora_r=2)
    made = []
    for base in (on_one(path), on_two(path)):
        with worker_state(base, [trial]) as state:
            made.append(state.new_adapter(trial, seed=3).weights)
    one, two = made
    assert all(torch.equal(a, two[name][0]) for name, (a, _) in one.items())


def test_a_module_in_two_places_is_refused(path: Path) -> None:
    model = load_model(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
    move(model.model.layers[0].mlp)
    model.model.layers[0].register_buffer("own", torch.zeros(1))
    with pytest.raises(ModelError, match=r"run.gpus_per_worker: model.layers.0, a LlamaDecoderLayer"):
        connect(model)


def test_it_finds_what_is_in_the_wrong_place(path: Path) -> None:
    with pytest.raises(RuntimeError, match="over two devices"):
        torch.ones(2) + torch.ones(2, device=DEVICE)
    model = load_model(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
    move(model.model.layers[1])
    with pytest.raises(RuntimeError, match="over two devices"):
        model(input_ids=torch.arange(4)[None])
