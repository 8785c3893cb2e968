"""A trial's own optimizer over weights in PEFT's shapes, built by its description in `tuner.methods`.

Trials in a pack never share an optimizer, so each one's moments, rate, decay, clipping and step counter are
identical to those of a trial alone, to the digit, in any slot.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import InputError, last_words
from tuner.methods.optimizers import optimizer
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Hyperparameters

_PARTS = ("A", "B", "magnitude")
"""The entries of a module's tuple; the last with DoRA only."""


class TrialOptimizer:
    """Float32 master weights of one adapter, their gradients, and the update.

    `weights` and `gradients` map module paths to (A, B) in PEFT's shapes, with DoRA (A, B, magnitude). All
    A's, all B's and all magnitudes are views of one flat vector each, so an elementwise optimizer runs one
    fused kernel for each.
    """

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, ...]],
        hyperparameters: Hyperparameters,
        *,
        device: torch.device,
    ) -> None:
        names = sorted(start)  # a checkpoint's flat moments must not depend on how its file was read
        method = optimizer(str(HYPERPARAMETERS["optimizer"].value(hyperparameters)))
        # B is stored transposed, as in the pack, so that copies between them are one kernel. Which elements
        # bitsandbytes quantises together depends on the layout: there B has PEFT's layout.
        flats, views, self._flat_gradients, gradients = [], [], [], []
        for part_name, part in zip(_PARTS, zip(*(start[name] for name in names), strict=True), strict=False):
            transposed = part_name == "B" and method.is_elementwise
            flatten = partial(_flatten, device=device, transposed=transposed, multiple=method.block_elements)
            flat, part_views = flatten(part)
            flat_gradient, part_gradients = flatten([torch.zeros_like(view) for view in part_views])
            flats.append(flat)
            views.append(part_views)
            self._flat_gradients.append(flat_gradient)
            gradients.append(part_gradients)
        self.weights = dict(zip(names, zip(*views, strict=True), strict=True))
        self.gradients = dict(zip(names, zip(*gradients, strict=True), strict=True))
        self._base_rate = HYPERPARAMETERS["learning_rate"].number(hyperparameters)
        self.max_norm = HYPERPARAMETERS["max_grad_norm"].number(hyperparameters)
        self._ratios = {"B": HYPERPARAMETERS["loraplus_ratio"].number(hyperparameters)}
        if method.is_elementwise:
            views, gradients = [[flat] for flat in flats], [[flat] for flat in self._flat_gradients]
        groups = [
            {
                "params": [_parameter(view, gradient) for view, gradient in zip(*tensors, strict=True)],
                "lr": self._base_rate * self._ratios.get(part_name, 1.0),
                "part": part_name,
            }
            for part_name, *tensors in zip(_PARTS, views, gradients, strict=False)
        ]
        self._optimizer = method.build(groups, hyperparameters)
        self._skips_on_device = method.skips_on_device
        self.decides_on_device = method.skips_on_device and device.type != "cpu"
        """Whether `step_on_device` updates; else the host reads each norm. A CPU has nothing to wait for."""
        self._built = [copy.deepcopy(own) for own in self._settings()]

    def zero_gradients(self) -> None:
        """Zero the gradients before an update."""
        for flat in self._flat_gradients:
            flat.zero_()

    def gradient_norm(self) -> Tensor:
        """Return the gradient's norm before clipping, as a tensor still on the device.

        Computed tensor by tensor, so it does not depend on the memory layout of the weights.
        """
        return nn.utils.get_total_norm([gradient for parts in self.gradients.values() for gradient in parts])

    def step(self, multiplier: float, *, norm: float) -> tuple[float, bool]:
        """Update the weights at `multiplier` times the trial's rate, unless the gradient is not finite.

        `norm` is the value of `gradient_norm`. Returns the rate and whether the gradient was clipped.
        """
        rate = self.rate(multiplier)
        if norm != norm or norm == float("inf"):
            return rate, False
        clipped = self.max_norm > 0 and norm > self.max_norm
        if clipped:
            coefficient = self.max_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
            for flat in self._flat_gradients:
                flat.mul_(coefficient)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._ratios.get(group["part"], 1.0)
        self._optimizer.step()
        return rate, clipped

    def step_on_device(self, multiplier: float, *, coefficient: Tensor, skipped: Tensor) -> None:
        """Update the weights without waiting for the device.

        Gradients are multiplied by `coefficient`; with `skipped` at 1, weights and state stay as they are.
        """
        for flat in self._flat_gradients:
            flat.mul_(coefficient)
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(multiplier) * self._ratios.get(group["part"], 1.0)
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]  # torch's own, for loss scaling
        self._optimizer.step()
        self._optimizer.found_inf = None  # type: ignore[attr-defined]

    def rate(self, multiplier: float) -> float:
        """Return `multiplier` times the trial's rate."""
        return self._base_rate * multiplier

    def state(self) -> dict[str, Tensor]:
        """Return the moments and counters as tensors by name, for a checkpoint.

        Settings of a group that an update has changed belong to it, such as Prodigy's estimate of the rate.
        """
        named = {}
        for number, parameter in enumerate(self._parameters()):
            for key, value in self._optimizer.state[parameter].items():
                named[f"{number}.{key}"] = _tensor(value if isinstance(value, Tensor) else int(value))
        for number, (built, own) in enumerate(zip(self._built, self._settings(), strict=True)):
            for key, value in own.items():
                if key not in built or not _is_same(value, built[key]):
                    kind = "tensor" if isinstance(value, Tensor) else "number"
                    named[f"group{number}.{kind}.{key}"] = _tensor(value)
        return named

    def load_state(self, named: Mapping[str, Tensor]) -> None:
        """Resume from `state`.

        Set directly, since bitsandbytes' `load_state_dict` and torch's cast tensors to the parameters' dtype
        by different rules.
        """
        parameters = self._parameters()
        for name, tensor in named.items():
            owner, _, key = name.partition(".")
            if owner.startswith("group"):
                kind, _, key = key.partition(".")
                group = self._optimizer.param_groups[int(owner.removeprefix("group"))]
                device = group["params"][0].device
                group[key] = tensor.item() if kind == "number" else tensor.to(device).clone()
                continue
            parameter = parameters[int(owner)]
            is_count = tensor.dtype == torch.int64 and tensor.dim() == 0
            # torch keeps its float step counter of a fused AdamW on the parameter's device, too.
            self._optimizer.state[parameter][key] = (
                int(tensor) if is_count else tensor.to(parameter.device).clone()
            )

    def mistake(self) -> str | None:
        """Return what a custom optimizer lacks; None if nothing is wrong."""
        groups = getattr(self._optimizer, "param_groups", None)
        if groups is None:
            return f"build returned {self._optimizer!r}, expects a torch.optim.Optimizer"
        if not all("part" in group for group in groups):
            return "its param_groups lack `part`; create it from the groups that `build` receives"
        for values in self._optimizer.state.values():
            for key, value in values.items():
                if not isinstance(value, (int, Tensor)):
                    return f"its state has {key} = {value!r}; checkpoints keep tensors and whole numbers"
        for built, own in zip(self._built, self._settings(), strict=True):
            for key, value in own.items():
                is_changed = key not in built or not _is_same(value, built[key])
                if is_changed and not isinstance(value, (int, float, Tensor)):
                    return f"an update sets {key} = {value!r}; checkpoints keep tensors and numbers"
        return None

    def does_not_skip(self) -> str | None:
        """Return what an optimizer with `skips_on_device` changes in an update that it is to skip."""
        if not self._skips_on_device:
            return None

        def kept() -> dict[str, Tensor]:
            weights = {
                f"{name}.{n}": part for name, parts in self.weights.items() for n, part in enumerate(parts)
            }
            return {name: value.clone() for name, value in (weights | self.state()).items()}

        before, one = kept(), self._flat_gradients[0].new_ones(())
        self.step_on_device(1.0, coefficient=one, skipped=one)
        changed = [name for name, value in kept().items() if not _is_same(value, before.get(name))]
        return f"skips_on_device=True, and found_inf = 1 changes {', '.join(changed)}" if changed else None

    def _settings(self) -> list[dict[str, Any]]:
        """Return the settings of each group, besides those that are set before each update."""
        groups = getattr(self._optimizer, "param_groups", [])
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr", "part")}
            for group in groups
        ]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def refuse_bad_optimizer(trial: Hyperparameters, *, device: torch.device) -> None:
    """Build a custom optimizer, update small weights once, and take its state through a checkpoint.

    Raises InputError for what would otherwise fail in every trial.
    """
    name = str(HYPERPARAMETERS["optimizer"].value(trial))
    weights = (torch.full((2, 4), 0.1), torch.full((4, 2), 0.1), torch.full((4,), 0.1))
    try:
        tried = TrialOptimizer({"layer": weights}, trial, device=device)
        if (mistake := tried.mistake()) is None:
            for gradient in tried._flat_gradients:
                gradient.fill_(1e-3)
            tried.step(1.0, norm=float(tried.gradient_norm()))
            if (mistake := tried.mistake() or tried.does_not_skip()) is None:
                tried.load_state(tried.state())
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        mistake = f"an update of small weights raised {last_words(error, __file__)}"
    if mistake is not None:
        raise InputError(f"optimizer {name}: {mistake}")


def _tensor(value: Tensor | float) -> Tensor:
    """Return a value of an optimizer's state as a tensor, to the digit."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _flatten(
    tensors: Sequence[Tensor], *, device: torch.device, transposed: bool, multiple: int
) -> tuple[Tensor, list[Tensor]]:
    """Copy the tensors into one float32 vector; return it and a view of each in its own shape.

    With a `multiple` above 1, the largest come first and each begins at a multiple of it, with zeros between.
    """
    laid = [tensor.t() if transposed else tensor for tensor in tensors]
    order = list(range(len(laid)))
    if multiple > 1:
        order.sort(key=lambda number: -laid[number].numel())
    places, end = {}, 0
    for number in order:
        start = -(-end // multiple) * multiple
        end = start + laid[number].numel()
        places[number] = slice(start, end)
    flat = torch.zeros(end, device=device)
    views = [flat[places[number]].view(tensor.shape) for number, tensor in enumerate(laid)]
    for view, tensor in zip(views, laid, strict=True):
        view.copy_(tensor)
    return flat, [view.t() if transposed else view for view in views]


def _parameter(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=True)
    parameter.grad = gradient
    return parameter
