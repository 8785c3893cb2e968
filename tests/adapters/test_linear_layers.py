"""A layer that does not see the rows one after another is refused before any trial begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tuner.adapters import Base
from tuner.adapters.base import freeze
from tuner.adapters.initial import meta_copy, targeted_modules
from tuner.adapters.linear_layers import refuse_unlike_linear
from tuner.errors import ModelError
from tuner.records import Fixed


class Returns(nn.Linear):
    """Returns more than a product, as the routers of some mixtures do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The product, and something else."""
        y = super().forward(x)
        return y, y


class Through(nn.Module):
    """A linear layer inside of something that arranges its inputs."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.inner = Returns(width, width) if kind == "tuple" else nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, length, width] -> the same"""
        match self.kind:
            case "tuple":
                return self.inner(x)[0]  # type: ignore[no-any-return]
            case "sent to":
                chosen = x[..., 0] > 0
                return x.masked_scatter(chosen[..., None], self.inner(x[chosen]))
            case "one by one":
                return torch.stack([self.inner(row) for row in x])
            case "transposed":
                return self.inner(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]
            case "flat":
                return self.inner(x.reshape(-1, x.shape[-1])).view(x.shape)  # type: ignore[no-any-return]
            case _:
                return self.inner(x)  # type: ignore[no-any-return]


def with_layer(models: tiny.Models, kind: str) -> Base:
    model = models.plain("llama")
    model.model.layers[1].mlp = Through(kind, model.config.hidden_size)
    return freeze(model, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["tuple", "sent to", "one by one", "transposed"])
def test_what_would_mix_trials_is_refused(models: tiny.Models, kind: str) -> None:
    with pytest.raises(
        ModelError, match=r"target_modules: model\.layers\.1\.mlp\.inner, a \w+, does not process every token"
    ):
        refuse_unlike_linear(
            with_layer(models, kind), ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.inner"]
        )


@pytest.mark.parametrize("kind", ["plain", "flat"])
def test_rows_one_after_another_are_what_a_pack_takes(models: tiny.Models, kind: str) -> None:
    base = with_layer(models, kind)
    refuse_unlike_linear(base, ["model.layers.1.mlp.inner"])
    assert not base.model.model.layers[1].mlp.inner._forward_hooks


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_layers_of_real_models(models: tiny.Models, shape: tiny.Shape) -> None:
    base = models.base(shape, dtype="bfloat16")
    modules = targeted_modules(
        meta_copy(base, base_path="x"), {"target_modules": Fixed("all-linear"), "lora_r": Fixed(1)}
    )
    assert len(modules) >= 8
    refuse_unlike_linear(base, modules)
