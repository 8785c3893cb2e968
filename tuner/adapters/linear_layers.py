"""Which layers a pack can wrap: linear ones that see every token of every row, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tuner.adapters.base import Base
from tuner.adapters.initial import remedy
from tuner.errors import ModelError

_ROWS, _LENGTH = 2, 4
_ROUNDING = 0.2
"""Relative, by norm. Kernels change with the shape; a layer that sees other rows differs by about 1."""


def widths(linear: nn.Module) -> tuple[int, int]:
    """Return the widths of the inputs and of the outputs."""
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[0]), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


@torch.no_grad()
def refuse_unlike_linear(base: Base, modules: Iterable[str]) -> None:
    """Refuse layers that mix rows, by comparing their inputs for two rows with those for the first alone.

    A pack tells trials apart by the order of their rows. A router that returns more than a product, an expert
    that sees only the tokens routed to it, and layers over another order of rows or tokens break that. Raises
    ModelError for the first such layer.
    """
    layers = {name: base.model.get_submodule(name) for name in sorted(modules)}
    ids = torch.arange(_ROWS * _LENGTH, device=base.device).view(_ROWS, _LENGTH) % base.vocabulary_size
    both, alone = _seen(base, layers, ids), _seen(base, layers, ids[:1])
    unfit = [
        name
        for name, layer in layers.items()
        if len(both[name]) != len(alone[name])
        or not all(
            _is_row_by_row(*calls, width=widths(layer)[1])
            for calls in zip(both[name], alone[name], strict=True)
        )
    ]
    if unfit:
        raise ModelError(
            f"hyperparameters.target_modules: {unfit[0]}, a {type(layers[unfit[0]]).__name__}, does not "
            "process every token of every row in order, so trials would mix there; all-linear includes "
            f"it, too: {remedy(layers, unfit)}"
        )


_Call = tuple[Tensor, object]
"""The inputs and the output of a layer."""


def _seen(base: Base, layers: dict[str, nn.Module], ids: Tensor) -> dict[str, list[_Call]]:
    seen: dict[str, list[_Call]] = {name: [] for name in layers}
    with _watching(layers, seen):
        base.model(input_ids=ids, use_cache=False)
    return seen


@contextmanager
def _watching(layers: dict[str, nn.Module], seen: dict[str, list[_Call]]) -> Iterator[None]:
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: seen[name].append((inputs[0], output))
        )
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_row_by_row(both: _Call, alone: _Call, *, width: int) -> bool:
    """Return whether the first half of a layer's inputs for two rows equals those for the first alone."""
    (x, y), (x_alone, _) = both, alone
    if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], width):
        return False
    if x.numel() != _ROWS * x_alone.numel() or x.shape[0] % _ROWS:
        return False
    first, expected = x.reshape(_ROWS, -1)[0].float(), x_alone.reshape(-1).float()
    return not bool((first - expected).norm() > _ROUNDING * expected.norm())  # NaN is the base model's own
