from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import bitsandbytes.optim.optimizer as bitsandbytes_optimizer
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.operators import operators_of
from tuner.errors import InputError
from tuner.methods import registry
from tuner.methods.optimizers import Optimizer
from tuner.records import Value
from tuner.training import optimizer as optimizer_module
from tuner.training.optimizer import TrialOptimizer, refuse_bad_optimizer

CPU = torch.device("cpu")
Norms = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
START = {
    "layer.b": (torch.arange(6.0).reshape(2, 3), torch.ones(4, 2)),
    "layer.a": (torch.ones(2, 5), torch.zeros(3, 2)),
}


def made(**changes: Value) -> TrialOptimizer:
    return TrialOptimizer(START, tiny.hyperparameters(**changes), device=CPU)


def fill(optimizer: TrialOptimizer, value: float) -> None:
    for pair in optimizer.gradients.values():
        for gradient in pair:
            gradient.fill_(value)


def step(optimizer: TrialOptimizer, multiplier: float = 1.0) -> tuple[float, float, bool]:
    """The rate, the norm and whether it was clipped."""
    norm = float(optimizer.gradient_norm())
    rate, clipped = optimizer.step(multiplier, norm=norm)
    return rate, norm, clipped


def flat(optimizer: TrialOptimizer) -> torch.Tensor:
    return torch.cat([weight.reshape(-1) for pair in optimizer.weights.values() for weight in pair])


def test_starts_at_the_adapter_and_leaves_it_alone() -> None:
    optimizer = made()
    for name, (a, b) in START.items():
        assert torch.equal(optimizer.weights[name][0], a)
        assert torch.equal(optimizer.weights[name][1], b)
    fill(optimizer, 1.0)
    step(optimizer)
    assert torch.equal(START["layer.a"][0], torch.ones(2, 5))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradient_that_is_not_finite_moves_nothing(kind: str, bad: float) -> None:
    """1e30 is finite, but its norm is not."""
    optimizer = made(optimizer=kind, weight_decay=0.5)
    fill(optimizer, 1.0)
    step(optimizer)
    before, state = flat(optimizer), optimizer.state()
    optimizer.gradients["layer.a"][0][0, 0] = bad
    _, norm, clipped = step(optimizer)
    assert not math.isfinite(norm)
    assert not clipped
    assert torch.equal(flat(optimizer), before)
    assert all(torch.equal(optimizer.state()[key], value) for key, value in state.items())


@given(limit=st.floats(0.01, 100), scale=st.floats(0.01, 100))
def test_clips_as_torch_does(limit: float, scale: float) -> None:
    optimizer = made(max_grad_norm=limit)
    reference = [torch.nn.Parameter(w.clone()) for pair in optimizer.weights.values() for w in pair]
    for parameter in reference:
        parameter.grad = torch.full_like(parameter, scale)
    fill(optimizer, scale)
    expected = float(torch.nn.utils.clip_grad_norm_(reference, limit))
    _, norm, clipped = step(optimizer)
    assert norm == pytest.approx(expected)
    assert clipped == (norm > limit)
    mine = [gradient for pair in optimizer.gradients.values() for gradient in pair]
    for gradient, parameter in zip(mine, reference, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-5)


def test_no_clipping_at_zero() -> None:
    optimizer = made(max_grad_norm=0.0)
    fill(optimizer, 1e6)
    assert step(optimizer)[2] is False
    assert float(optimizer.gradients["layer.a"][0].max()) == 1e6


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_rates_of_a_and_b(kind: str) -> None:
    """AdamW's first update is the rate itself: LoRA+ gives B its own."""
    optimizer = made(optimizer=kind, learning_rate=0.01, loraplus_ratio=8.0)
    fill(optimizer, 1.0)
    rate, _, _ = step(optimizer, 0.5)
    assert rate == pytest.approx(0.005)
    for name, (a, b) in START.items():
        assert torch.allclose(optimizer.weights[name][0], a - 0.005, atol=1e-6)
        assert torch.allclose(optimizer.weights[name][1], b - 0.04, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_every_hyperparameter_is_the_libraries(kind: str) -> None:
    """Betas, epsilon and decay, each far from its default, over steps with different gradients."""
    changes = {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 0.3, "weight_decay": 0.4}
    optimizer = made(optimizer=kind, learning_rate=0.01, max_grad_norm=0.0, **changes)
    mine = [weight for part in (0, 1) for weight in (pair[part] for pair in optimizer.weights.values())]
    reference = [torch.nn.Parameter(weight.clone()) for weight in mine]
    library = torch.optim.AdamW if kind == "adamw" else AdamW8bit
    theirs = library(reference, lr=0.01, betas=(0.5, 0.7), eps=0.3, weight_decay=0.4)
    for value in (1.0, -0.2, 3.0):
        for parameter in reference:
            parameter.grad = torch.full_like(parameter, value)
        fill(optimizer, value)
        theirs.step()
        step(optimizer)
    for weight, parameter in zip(mine, reference, strict=True):
        assert torch.allclose(weight, parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_magnitudes_have_the_rate_of_a(kind: str) -> None:
    """And a checkpoint's moments are theirs, too: going on is what not stopping is."""
    start = {name: (a, b, torch.ones(len(b))) for name, (a, b) in START.items()}
    trial = tiny.hyperparameters(optimizer=kind, learning_rate=0.01, loraplus_ratio=8.0, max_grad_norm=0.0)
    one = TrialOptimizer(start, trial, device=CPU)
    fill(one, 1.0)
    assert float(one.gradient_norm()) == pytest.approx(math.sqrt(flat(one).numel()))
    step(one)
    for _, _, magnitude in one.weights.values():
        assert torch.allclose(magnitude, torch.full_like(magnitude, 0.99), atol=1e-6)
    other = TrialOptimizer(one.weights, trial, device=CPU)
    other.load_state(one.state())
    for optimizer in (one, other):
        fill(optimizer, -0.5)
        step(optimizer)
    assert torch.equal(flat(one), flat(other))


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_state_does_not_depend_on_the_order_of_modules(kind: str) -> None:
    """A checkpoint's file has an order of its own."""
    one = made(optimizer=kind)
    other = TrialOptimizer(dict(reversed(START.items())), tiny.hyperparameters(optimizer=kind), device=CPU)
    for optimizer in (one, other):
        for name, pair in optimizer.gradients.items():
            for number, gradient in enumerate(pair):
                gradient.fill_(len(name) + number + float(name == "layer.b"))
        step(optimizer)
    assert one.state().keys() == other.state().keys()
    assert all(torch.equal(other.state()[key], value) for key, value in one.state().items())


class _Counts(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["decay"] = 0.5


class _Says(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["phase"] = "late"


def _raises(groups, values):
    raise RuntimeError("needs a GPU of another kind")


FAULTY = {
    "nothing": (lambda groups, values: None, "build returned None, expects a torch.optim.Optimizer"),
    "weights": (
        lambda groups, values: torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1),
        "its param_groups lack `part`",
    ),
    "raises": (_raises, r"raised RuntimeError: needs a GPU of another kind \(.*test_optimizer.py:\d+\)"),
    "fraction": (lambda groups, values: _Counts(groups), "its state has decay = 0.5; checkpoints keep"),
    "word": (lambda groups, values: _Says(groups), "an update sets phase = 'late'; checkpoints keep"),
}


@pytest.mark.parametrize("is_elementwise", [True, False])
@pytest.mark.parametrize("name", FAULTY)
def test_a_custom_optimizer_that_cannot_work_is_named_before_any_trial(
    monkeypatch: pytest.MonkeyPatch, name: str, is_elementwise: bool
) -> None:
    build, message = FAULTY[name]
    described = Optimizer(
        name=name, hyperparameters=(), state_bytes=4, build=build, is_elementwise=is_elementwise
    )
    monkeypatch.setitem(globals(), "DESCRIBED", described)
    path = f"{__name__}:DESCRIBED"
    registry._found.cache_clear()
    with pytest.raises(InputError, match=f"^optimizer {path}: .*{message}"):
        refuse_bad_optimizer(tiny.hyperparameters(optimizer=path), devices=[CPU])


class _Estimates(torch.optim.Optimizer):
    """SGD whose rate it finds itself, and which keeps what it found in its groups, as Prodigy does."""

    def __init__(self, groups):
        super().__init__(groups, {"d": 0.1, "grows": True, "k": 0})
        for group in self.param_groups:
            group["seen"] = torch.zeros(2)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            size = sum(float(weight.grad.abs().sum()) for weight in group["params"])
            group["d_numerator"] = group.get("d_numerator", 0.0) + size
            if group["grows"]:
                group["d"] = group["d"] + 0.3 * group["d_numerator"] / (1 + group["k"])
            group["grows"] = not group["grows"]
            group["k"] += 1
            group["seen"][group["k"] % 2] += size
            for weight in group["params"]:
                weight.sub_(weight.grad, alpha=group["lr"] * (group["d"] + float(group["seen"].sum())))


ESTIMATES = Optimizer(
    name="estimates",
    hyperparameters=(),
    state_bytes=0,
    build=lambda groups, values: _Estimates(groups),
    is_elementwise=True,
)


SAYS_IT_SKIPS = replace(ESTIMATES, skips_on_device=True)


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
def test_what_an_optimizer_keeps_in_its_groups_is_resumed(updates: int, tmp_path: Path) -> None:
    trial = tiny.hyperparameters(optimizer=f"{__name__}:ESTIMATES")
    refuse_bad_optimizer(trial, devices=[CPU])
    one = TrialOptimizer(START, trial, device=CPU)
    for value in (0.5, -0.2, 0.7)[:updates]:
        fill(one, value)
        step(one, 0.5)
    save_file(one.state(), tmp_path / "optimizer.safetensors")
    other = TrialOptimizer(one.weights, trial, device=CPU)
    other.load_state(load_file(tmp_path / "optimizer.safetensors"))
    for optimizer in (one, other):
        for value in (-0.4, 0.9, 0.3):
            fill(optimizer, value)
            step(optimizer)
    assert torch.equal(flat(one), flat(other))
    assert all(torch.equal(one.state()[key], value) for key, value in other.state().items())
    assert one.state().keys() == other.state().keys()


@pytest.mark.parametrize("kind", registry.BUILT_IN["optimizer"])
def test_tuners_own_keep_nothing_in_their_groups(kind: str) -> None:
    optimizer = made(optimizer=kind)
    fill(optimizer, 0.5)
    step(optimizer, 0.5)
    assert not [name for name in optimizer.state() if name.startswith("group")]


@pytest.mark.parametrize("name", registry.BUILT_IN["optimizer"])
def test_what_is_asked_of_a_custom_optimizer_holds_of_each_built_in(name: str) -> None:
    chosen = tiny.hyperparameters(optimizer=name)
    refuse_bad_optimizer(chosen, devices=[CPU])
    assert chosen == tiny.hyperparameters(optimizer=name), "what it tries leaves the trial as it is"


def test_an_optimizer_that_does_not_skip_says_so() -> None:
    trial = tiny.hyperparameters(optimizer=f"{__name__}:SAYS_IT_SKIPS")
    with pytest.raises(
        InputError, match=r"skips_on_device=True, and found_inf = 1 changes layer\.0, layer\.1"
    ):
        refuse_bad_optimizer(trial, devices=[CPU])


class _OneVector(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            (weights,) = group["params"]
            weights.data.sub_(weights.grad, alpha=group["lr"])


ONE_VECTOR = replace(ESTIMATES, build=lambda groups, values: _OneVector(groups))


def test_a_custom_optimizer_is_tried_on_as_many_devices_as_a_worker_has() -> None:
    """Each device has a vector of each part."""
    trial = tiny.hyperparameters(optimizer=f"{__name__}:ONE_VECTOR")
    refuse_bad_optimizer(trial, devices=[CPU])
    with pytest.raises(InputError, match=r"raised ValueError: too many values to unpack"):
        refuse_bad_optimizer(trial, devices=[CPU, torch.device("cpu", 0)])
    refuse_bad_optimizer(tiny.hyperparameters(), devices=[CPU, torch.device("cpu", 0)])


LARGE = {f"layer.{n}": (torch.randn(16, 300 + n), torch.randn(290 + 7 * n, 16)) for n in range(6)}
"""Of 4,640 to 5,200 elements, none a multiple of 256."""


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion_8bit", "lion"])
def test_one_call_updates_all_tensors_of_a_vector_and_nothing_waits(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(module: object, name: str) -> None:
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.update([name]), own(*a, **k))[1])

    count(functional, "optimizer_update_8bit_blockwise")
    count(functional, "optimizer_update_32bit")
    count(bitsandbytes_optimizer, "sync_gpu")
    start = LARGE | START  # some small enough for 32-bit states
    optimizer = TrialOptimizer(start, tiny.hyperparameters(optimizer=kind), device=CPU)
    for updates in (1, 2):
        fill(optimizer, 0.5)
        step(optimizer)
        wanted = {"optimizer_update_32bit": 2 * updates}
        if kind != "lion":
            wanted["optimizer_update_8bit_blockwise"] = 2 * updates
        assert calls == wanted


@pytest.mark.parametrize("decides", ["host", "device"])
@pytest.mark.parametrize("start", [LARGE, LARGE | START], ids=["large", "small, too"])
def test_operators_of_8_bit_adamw(decides: str, start: dict[str, tuple[torch.Tensor, ...]]) -> None:
    """Measured: 1.0 times AdamW's where the host decides, 1.6 to 2.9 times where the device does."""
    found = {}
    for kind in ("adamw", "adamw_8bit"):
        optimizer = TrialOptimizer(start, tiny.hyperparameters(optimizer=kind), device=CPU)
        fill(optimizer, 0.5)
        step(optimizer)
        update = (
            partial(optimizer.step, 1.0, norm=float(optimizer.gradient_norm()))
            if decides == "host"
            else partial(optimizer.step_on_device, 1.0, orders=torch.tensor([[1.0], [0.0]]), number=0)
        )
        found[kind] = operators_of(update).total
    assert 0 < found["adamw_8bit"] <= 3 * found["adamw"]


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion_8bit"])
def test_a_checkpoint_is_in_the_librarys_form(kind: str) -> None:
    """One of an earlier version, tensor by tensor, is resumed; and resuming is not stopping."""
    trial = tiny.hyperparameters(optimizer=kind)
    one = TrialOptimizer(LARGE, trial, device=CPU)
    fill(one, 0.3)
    step(one)
    state = one.state()
    number = sorted(LARGE).index("layer.4")
    assert state[f"{number}.state1"].shape == LARGE["layer.4"][0].shape
    assert len(state[f"{number}.absmax1"]) == -(-LARGE["layer.4"][0].numel() // 256)
    other = TrialOptimizer(one.weights, trial, device=CPU)
    other.load_state(state)
    for value in (-0.7, 0.1):
        for optimizer in (one, other):
            fill(optimizer, value)
            step(optimizer)
    assert torch.equal(flat(one), flat(other))
    assert all(torch.equal(one.state()[key], value) for key, value in other.state().items())


@pytest.mark.parametrize("norms", [optimizer_module._norm_each, optimizer_module._norms])
def test_a_norm_over_two_devices_is_that_over_one(monkeypatch: pytest.MonkeyPatch, norms: Norms) -> None:
    """With torch's private operator and, where a torch lacks it, without."""
    monkeypatch.setattr(optimizer_module, "_norm_each", norms)
    places = {name: torch.device("cpu", number % 2) for number, name in enumerate(sorted(LARGE))}
    one = TrialOptimizer(LARGE, tiny.hyperparameters(), device=CPU)
    spread = TrialOptimizer(LARGE, tiny.hyperparameters(), device=torch.device("cpu", 0), places=places)
    draw = torch.Generator().manual_seed(0)
    for name, parts in one.gradients.items():
        for part, same in zip(parts, spread.gradients[name], strict=True):
            part.normal_(generator=draw)
            same.copy_(part)
    assert len(set(places.values())) == 2
    assert torch.equal(spread.gradient_norm(), one.gradient_norm())
