"""Muon, from torch, for the A and B matrices; DoRA's magnitudes, which are vectors, use AdamW.

The momentum of each matrix is orthogonalized approximately by five Newton-Schulz steps in bfloat16. Keller
Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024); Liu et al., "Muon is Scalable for
LLM Training" (arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Flag, Number, OneOf
from tuner.methods.optimizers import WEIGHT_DECAY, Optimizer, adam_arguments
from tuner.methods.optimizers.skipping import unchanged_if
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch

MUON_MOMENTUM = Hyperparameter(
    "muon_momentum",
    0.95,
    Number(at_least=0, below=1),
    "Decay rate of the momentum (Muon, arXiv:2502.16982).",
)
MUON_NESTEROV = Hyperparameter("muon_nesterov", True, Flag(), "Use Nesterov momentum.")
MUON_RATE = Hyperparameter(
    "muon_rate",
    "match_rms_adamw",
    OneOf(("match_rms_adamw", "original")),
    "Scaling of the learning rate by a matrix's shape. match_rms_adamw: 0.2 sqrt(longer side), so that "
    "updates are as large as AdamW's and its learning rates work. original: max(1, sqrt(rows / columns)).",
)


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    import torch

    def is_of_matrices(group: dict[str, Any]) -> bool:
        return all(parameter.dim() == 2 for parameter in group["params"])

    muon: torch.optim.Optimizer = _skipping(torch.optim.Muon)(
        list(filter(is_of_matrices, groups)),
        momentum=MUON_MOMENTUM.number(values),
        nesterov=bool(MUON_NESTEROV.value(values)),
        weight_decay=WEIGHT_DECAY.number(values),
        adjust_lr_fn=str(MUON_RATE.value(values)),
    )
    others = [group for group in groups if not is_of_matrices(group)]
    if not others:
        return muon
    return _together(muon, torch.optim.AdamW(others, fused=True, **adam_arguments(values)))


@cache
def _skipping(library: type) -> type:
    """Return torch's Muon, whose step changes nothing if `found_inf` is 1."""
    import torch

    class Skipping(library):  # type: ignore[misc]
        found_inf: torch.Tensor | None = None

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """Update all parameters, which have gradients, unless `found_inf` is 1."""
            assert closure is None
            weights = [parameter for group in self.param_groups for parameter in group["params"]]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)
            moments = [self.state[weight]["momentum_buffer"] for weight in weights]
            with unchanged_if(self.found_inf, [*weights, *moments]):
                super().step()

    return Skipping


def _together(*parts: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Combine optimizers of different parameters into one, with one state and all groups."""
    import torch

    class Together(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], {})
            self.param_groups = [group for part in parts for group in part.param_groups]
            for part in parts:
                part.state = self.state

        def step(self, closure: Any = None) -> Any:
            for part in parts:
                part.found_inf = getattr(self, "found_inf", None)  # type: ignore[attr-defined]
                part.step()

    return Together()


MUON = Optimizer(
    name="muon",
    hyperparameters=(WEIGHT_DECAY, MUON_MOMENTUM, MUON_NESTEROV, MUON_RATE),
    state_bytes=4,
    build=_build,
    amplifies_rounding=True,
    skips_on_device=True,
)
