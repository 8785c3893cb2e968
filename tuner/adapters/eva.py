"""EVA's initialisation (arXiv:2410.07170): A from what each layer reads of training rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tuner.adapters.base import Base
from tuner.adapters.evaluation import TokenGrid, grid
from tuner.adapters.initial import Adapter
from tuner.data import Examples, batch_rows
from tuner.errors import ModelError

_log = logging.getLogger(__name__)

EVA_PASS_TOKENS = 4096
"""Tokens of a pass over the base model, including padding; a row of more tokens is a pass of its own. A
constant, so that an adapter does not depend on the memory of the machine."""
EVA_MAX_PASSES = 100
"""Passes after which directions are taken as they are. PEFT goes on until all of them have converged."""
_SEED = 42
"""PEFT's seed of the randomised SVD."""


class _Directions:
    """The first principal components of a layer's inputs, updated pass by pass."""

    def __init__(self, rank: int, *, tau: float) -> None:
        self._rank, self._tau = rank, tau
        self._pca = IncrementalPCA(n_components=rank, lowrank=True, lowrank_seed=_SEED)
        self._waiting: list[Tensor] = []
        self.has_converged = False

    @property
    def components(self) -> Tensor | None:
        """Return [rank, width], orthonormal rows; None before enough tokens have been seen."""
        return getattr(self._pca, "components_", None)

    def add(self, inputs: Tensor) -> None:
        """Update with the inputs [tokens, width] of a pass, once there are as many tokens as directions."""
        self._waiting.append(inputs.float())
        if sum(map(len, self._waiting)) < self._rank:
            return
        before = self.components
        self._pca.partial_fit(torch.cat(self._waiting))
        self._waiting = []
        if before is not None and self.components is not None:
            alike = cosine_similarity(self.components, before)
            self.has_converged = bool((alike >= self._tau).all())


@torch.no_grad()
def with_eva(adapter: Adapter, base: Base, train: Examples, *, seed: int) -> Adapter:
    """Return a new adapter with EVA's A, as `peft.initialize_lora_eva_weights` computes it with rho = 1.

    The rows are those that a trial of this seed trains on first, in that order, and only inputs at target
    tokens count. The base model runs without adapters. Raises ModelError if the rank exceeds the width of a
    layer's inputs.
    """
    _refuse_narrow(adapter)
    inputs = _LayerInputs(adapter.config.r, tau=adapter.config.eva_config.tau)
    with ExitStack() as hooks:
        for name in adapter.weights:
            hook = base.model.get_submodule(name).register_forward_hook(partial(inputs.read, name))
            hooks.callback(hook.remove)
        num_passes = 0
        for rows in itertools.islice(_passes(train, seed=seed), EVA_MAX_PASSES):
            inputs.tokens = tokens = grid([[train[row] for row in rows]], device=base.device)
            # One token's logits are enough: the layers run over all of them.
            base.token_scores(tokens.input_ids, tokens.rows[:1], tokens.columns[:1])
            num_passes += 1
            if inputs.have_converged:
                break
    _log.info("eva: rank %d, %d passes, converged: %s", adapter.config.r, num_passes, inputs.have_converged)
    weights = {name: (inputs.directions(name), *others) for name, (_, *others) in adapter.weights.items()}
    return Adapter(adapter.config, weights)


class _LayerInputs:
    """The directions of each layer; layers that read the same tensor in a row share theirs."""

    def __init__(self, rank: int, *, tau: float) -> None:
        self._rank, self._tau = rank, tau
        self._by_layer: dict[str, _Directions] = {}
        self._last: tuple[Tensor, _Directions] | None = None
        self.tokens: TokenGrid | None = None
        """The rows of the current pass."""

    def read(self, name: str, _: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
        """Take a layer's inputs, as a forward hook."""
        assert self.tokens is not None
        x = inputs[0]
        if self._last is not None and self._last[0] is x:
            self._by_layer.setdefault(name, self._last[1])
            return
        found = self._by_layer.setdefault(name, _Directions(self._rank, tau=self._tau))
        self._last = x, found
        if not found.has_converged:
            at = self.tokens.rows * self.tokens.input_ids.shape[1] + self.tokens.columns
            found.add(x.reshape(-1, x.shape[-1])[at.to(x.device)])

    @property
    def have_converged(self) -> bool:
        """Return whether the last pass changed no layer's directions much."""
        return all(each.has_converged for each in self._by_layer.values())

    def directions(self, name: str) -> Tensor:
        """Return a layer's A [rank, width] in float32 on the CPU."""
        found = self._by_layer[name].components
        assert found is not None, "some pass has had enough tokens"
        return found.float().cpu()


def _refuse_narrow(adapter: Adapter) -> None:
    for name, (a, *_) in adapter.weights.items():
        if a.shape[0] > a.shape[1]:
            raise ModelError(
                f"hyperparameters.lora_r: {a.shape[0]} with lora_init: eva expects at most {a.shape[1]}, the "
                f"width of the inputs of {name}"
            )


def _passes(train: Examples, *, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each pass, without end: those of a seed's updates, whatever their batch size."""
    rows: list[int] = []
    longest = 0
    for step in itertools.count(1):
        (row,) = batch_rows(len(train), batch_size=1, seed=seed, step=step)
        longest = max(longest, int(train.num_tokens[row]))
        if rows and longest * (len(rows) + 1) > EVA_PASS_TOKENS:
            yield rows
            rows, longest = [], int(train.num_tokens[row])
        rows.append(row)
