"""A device that computes nothing: wrong places and waits of the host show without a GPU.

torch lets Python register a backend, and its fake tensors have a device and no values. So an operator over
two devices raises, and so does each read of a value that does not go through `device_io.read`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.optim import optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.training.driving import Hyperparameters, worker_state
from tuner.adapters import Base, Pack, device_io, evaluation
from tuner.adapters.frozen_linear import speed_up
from tuner.adapters.joined import Attention
from tuner.adapters.placement import connect
from tuner.records import Assignment
from tuner.training import packed_passes, trial_run
from tuner.training.device_updates import BAD, RESTS_AT
from tuner.training.trial_run import TrialRun
from tuner.training.worker_state import WorkerState

FIRST = "accel:0"
SECOND = "meta"
"""Python's device guard has one device, whose autograd has one queue. That of `meta` is the second; fake
tensors keep the two apart as any others."""


class _Backend(_DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """All numbers are drawn on the host, whose state is restored besides."""


@cache
def register() -> None:
    """Register the backend, once a process."""
    _setup_privateuseone_for_python_backend("accel", backend_module=_Backend())


@dataclass
class Reads:
    """What the host asked the device for, and the numbers that it got."""

    answer: Callable[[Sequence[Tensor]], list[list[float]]]
    devices: list[str] = field(default_factory=list)
    """Of each read."""

    def __call__(self, tensors: Sequence[Tensor]) -> list[list[float]]:
        found = {str(tensor.device) for tensor in tensors}
        assert len(found) <= 1, f"one read of tensors on {found}"
        self.devices += found
        made = self.answer(tensors)
        assert [len(values) for values in made] == [tensor.numel() for tensor in tensors]
        return made


def ones(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Answer each value by 1, and that no trial is infeasible."""
    return [tally(1.0) if is_tally(tensor) else [1.0] * tensor.numel() for tensor in tensors]


def tally(value: float, *, rests_at: int = 0, bad: int = 0) -> list[float]:
    """Return what a trial's updates came to."""
    made = [*[value] * RESTS_AT, float(rests_at)]
    made[BAD] = float(bad)
    return made


def is_tally(tensor: Tensor) -> bool:
    """Return whether the device decided a trial's updates and counted them here."""
    return tensor.dtype == torch.float64 and tensor.shape == (RESTS_AT + 1,)


@contextmanager
def accelerated(answer: Callable[[Sequence[Tensor]], list[list[float]]] = ones) -> Iterator[Reads]:
    """Within the block tensors are fake, and all reads by the host get chosen numbers."""
    register()
    reads = Reads(answer)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for module in (device_io, evaluation, packed_passes, trial_run):
            patch.setattr(module, "read", reads)
        patch.setattr(packed_passes, "_dropout_keys", _with_values(packed_passes._dropout_keys))
        # bitsandbytes computes its codes on the host, of which only the size matters here.
        patch.setattr(functional, "create_dynamic_map", lambda *_, **__: torch.zeros(256))
        # torch's fused AdamW lists the devices that have it.
        devices = [*_get_fused_kernels_supported_devices(), SECOND]
        patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: devices)
        yield reads


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """The host computes with numbers."""

    def computing(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return computing


@dataclass(frozen=True)
class Accelerated:
    """A worker's state on devices without values, a run in each wanted slot, and what the host read."""

    state: WorkerState
    runs: dict[int, TrialRun]
    reads: Reads


@contextmanager
def training(
    trials: Mapping[int, Hyperparameters],
    *,
    dtype: torch.dtype = torch.bfloat16,
    joins_rows: bool = True,
    micro_tokens: int = 1 << 20,
    answer: Callable[[Sequence[Tensor]], list[list[float]]] = ones,
    second: Sequence[str] = (),
    num_layers: int = 2,
    attention: Attention = "torch",
) -> Iterator[Accelerated]:
    """Trials by slot on a Llama, of which modules may be on the second device.

    PEFT makes their adapters first, on the host, as a worker's do.
    """
    model = (
        AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=num_layers), dtype=dtype)
        .eval()
        .requires_grad_(False)
    )
    base = Base(model, dtype, head_is_linear=True)  # what `freeze` finds out by computing is said instead
    base.joins_rows, base.last, base.attention = joins_rows, model.model.layers[-1].mlp, attention
    speed_up(model)
    with worker_state(base, trials.values(), micro_tokens=micro_tokens) as state:
        starts = {slot: state.new_adapter(trial, seed=slot) for slot, trial in trials.items()}
    modules = {name for start in starts.values() for name in start.weights}
    with accelerated(answer) as reads:
        place(model, FIRST)
        for name in second:
            place(model.get_submodule(name), SECOND)
        connect(model)
        num_slots, max_rank = max(trials) + 1, max(start.config.r for start in starts.values())
        state.pack = Pack(base, num_slots=num_slots, max_rank=max_rank, modules=modules)
        runs = {}
        for slot, trial in trials.items():
            assignment = Assignment("round1", slot, 1, trial, 99, 99, directory="")
            runs[slot] = state.new_run(assignment, starts[slot])
            state.pack.occupy(slot, starts[slot])
        yield Accelerated(state, runs, reads)


class Crossings(TorchDispatchMode):
    """Counts copies between devices within the block, by where from and where to."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if operator is torch.ops.aten.copy_.default else args[0]
            if source.device != made.device:
                self.counted[str(source.device), str(made.device)] += 1
        return made


def place(model: nn.Module, device: str) -> None:
    """Move a module without its values; `Module.to` cannot exchange fake tensors of two devices."""

    def there(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(there(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, there(buffer))
