"""A trial's own optimizer: torch's AdamW or bitsandbytes' 8-bit one, over weights in PEFT's shapes.

Trials in a pack never share an optimizer, so each one's moments, rate, decay, clipping and step counter are
identical to those of a trial alone, to the digit, in any slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuner.records import Hyperparameters

_B = 1
"""Index of B in a module's tuple."""


class TrialOptimizer:
    """Float32 master weights of one adapter, their gradients, and the update.

    `weights` and `gradients` map module paths to (A, B) in PEFT's shapes, with DoRA (A, B, magnitude). All
    A's, all B's and all magnitudes are views of one flat vector each, so AdamW runs one fused kernel for
    each.
    """

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, ...]],
        hyperparameters: Hyperparameters,
        *,
        device: torch.device,
    ) -> None:
        names = sorted(start)  # a checkpoint's flat moments must not depend on how its file was read
        is_8bit = hyperparameters.get("optimizer", "adamw") == "adamw_8bit"
        # B is stored transposed, as in the pack, so that copies between them are one kernel. Which elements
        # bitsandbytes quantises together depends on the layout: there B has PEFT's layout.
        flats, views, self._flat_gradients, gradients = [], [], [], []
        for number, part in enumerate(zip(*(start[name] for name in names), strict=True)):
            transposed = number == _B and not is_8bit
            flat, part_views = _flatten(part, device, transposed=transposed)
            flat_gradient, part_gradients = _flatten(
                [torch.zeros_like(view) for view in part_views], device, transposed=transposed
            )
            flats.append(flat)
            views.append(part_views)
            self._flat_gradients.append(flat_gradient)
            gradients.append(part_gradients)
        self.weights = dict(zip(names, zip(*views, strict=True), strict=True))
        self.gradients = dict(zip(names, zip(*gradients, strict=True), strict=True))
        self._base_rate = _number(hyperparameters, "learning_rate")
        self._max_norm = _number(hyperparameters, "max_grad_norm", 1.0)
        self._ratios = [1.0] * len(flats)
        self._ratios[_B] = _number(hyperparameters, "loraplus_ratio", 1.0)
        settings: dict[str, Any] = {
            "lr": self._base_rate,
            "betas": (
                _number(hyperparameters, "adam_beta1", 0.9),
                _number(hyperparameters, "adam_beta2", 0.999),
            ),
            "eps": _number(hyperparameters, "adam_epsilon", 1e-8),
            "weight_decay": _number(hyperparameters, "weight_decay", 0.0),
        }
        if is_8bit:
            self._optimizer = _adamw_8bit(views, gradients, settings)
        else:
            groups = [
                {"params": [_parameter(flat, gradient)]}
                for flat, gradient in zip(flats, self._flat_gradients, strict=True)
            ]
            self._optimizer = torch.optim.AdamW(groups, fused=True, **settings)

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
        rate = self._base_rate * multiplier
        if norm != norm or norm == float("inf"):
            return rate, False
        clipped = self._max_norm > 0 and norm > self._max_norm
        if clipped:
            coefficient = self._max_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
            for flat in self._flat_gradients:
                flat.mul_(coefficient)
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio
        self._optimizer.step()
        return rate, clipped

    def state(self) -> dict[str, Tensor]:
        """Return the moments and counters as tensors by name, for a checkpoint."""
        named = {}
        for number, parameter in enumerate(self._parameters()):
            for key, value in self._optimizer.state[parameter].items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                named[f"{number}.{key}"] = tensor.detach().cpu().contiguous().clone()
        return named

    def load_state(self, named: Mapping[str, Tensor]) -> None:
        """Resume from `state`.

        Set directly, since bitsandbytes' `load_state_dict` and torch's cast tensors to the parameters' dtype
        by different rules.
        """
        parameters = self._parameters()
        for name, tensor in named.items():
            number, _, key = name.partition(".")
            parameter = parameters[int(number)]
            is_count = tensor.dtype == torch.int64 and tensor.dim() == 0
            # torch keeps its float step counter of a fused AdamW on the parameter's device, too.
            self._optimizer.state[parameter][key] = (
                int(tensor) if is_count else tensor.to(parameter.device).clone()
            )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]


def _flatten(
    tensors: Sequence[Tensor], device: torch.device, *, transposed: bool
) -> tuple[Tensor, list[Tensor]]:
    """Copy the tensors into one float32 vector; return it and a view of each in its own shape."""
    laid = [tensor.t() if transposed else tensor for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1).float() for tensor in laid]).to(device).clone()
    parts = torch.split(flat, [tensor.numel() for tensor in laid])
    views = [part.view(tensor.shape) for part, tensor in zip(parts, laid, strict=True)]
    return flat, [view.t() if transposed else view for view in views]


def _parameter(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=True)
    parameter.grad = gradient
    return parameter


def _adamw_8bit(
    views: Sequence[list[Tensor]],
    gradients: Sequence[list[Tensor]],
    settings: dict[str, Any],
) -> torch.optim.Optimizer:
    """Update tensor by tensor: bitsandbytes quantises blocks of 256 within one, keeping small ones in 32 "
    "bits."""
    from bitsandbytes.optim import AdamW8bit

    groups = [
        {"params": [_parameter(view, gradient) for view, gradient in zip(part, grads, strict=True)]}
        for part, grads in zip(views, gradients, strict=True)
    ]
    return AdamW8bit(groups, **settings)  # type: ignore[no-any-return]


def _number(hyperparameters: Hyperparameters, name: str, default: float | None = None) -> float:
    value = hyperparameters[name] if default is None else hyperparameters.get(name, default)
    assert isinstance(value, (int, float))
    return float(value)
