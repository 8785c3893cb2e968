"""DoRA is PEFT's: its magnitudes at the start, its outputs and its gradients."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tests.adapters.plain_dropout import dropout_mask
from tuner.adapters import Adapter, Base, Pack, PackedRows, initial_adapter, read_adapter, write_adapter
from tuner.adapters.dora import weight_norm
from tuner.adapters.frozen_linear import row_keys
from tuner.adapters.initial import lora_config, meta_copy
from tuner.errors import ModelError

SHAPES: tuple[tiny.Shape, ...] = ("llama", "gpt2")
KEYS = row_keys(3, 5, torch.tensor([4, 1]))


@contextmanager
def packed(base: Base, **changes: object) -> Iterator[tuple[Pack, Adapter]]:
    """A pack of one slot, and the adapter that a trial would start from."""
    path = str(base.model.name_or_path)
    trial = tiny.hyperparameters(use_dora=True, **changes)  # type: ignore[arg-type]
    lora = initial_adapter(meta_copy(base, base_path=path), lora_config(trial, base_path=path), seed=1)
    pack = Pack(base, num_slots=1, max_rank=6, modules=lora.weights)
    try:
        yield pack, pack.with_magnitudes(lora)
    finally:
        pack.close()


def moved(adapter: Adapter) -> Adapter:
    """As after some training: B is not zero, and the magnitudes are not the norms."""
    generator = torch.Generator().manual_seed(0)
    return Adapter(
        adapter.config,
        {
            name: (
                a,
                torch.randn(b.shape, generator=generator) * 0.1,
                magnitude * (1 + 0.2 * torch.rand(magnitude.shape, generator=generator)),
            )
            for name, (a, b, magnitude) in adapter.weights.items()
        },
    )


def parts(module: LoraLayer) -> list[Tensor]:
    held = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
    return [part["default"].weight for part in held]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_starts_as_peft_does(models: tiny.Models, shape: tiny.Shape) -> None:
    with packed(models.base(shape)) as (_, adapter):
        torch.manual_seed(1)
        theirs = lora_layers(get_peft_model(models.plain(shape), lora_config_of(adapter)))
    assert adapter.weights.keys() == theirs.keys()
    for name, ours in adapter.weights.items():
        assert len(ours) == 3
        assert all(torch.equal(mine, part) for mine, part in zip(ours[:2], parts(theirs[name]), strict=False))
        assert torch.allclose(ours[2], parts(theirs[name])[2], rtol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_base(models: tiny.Models, quantization: str) -> None:
    """PEFT's norms are those of the dequantised weights, rounded to the base's dtype."""
    config = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if quantization == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    )
    plain = AutoModelForCausalLM.from_pretrained(
        models.path("llama", **tiny.WIDE), dtype=torch.float32, quantization_config=config
    )
    base = models.base("llama", quantization=quantization, **tiny.WIDE)
    with packed(base) as (_, adapter):
        theirs = lora_layers(get_peft_model(plain, lora_config_of(adapter)))
        for name, (_, _, magnitude) in adapter.weights.items():
            assert torch.allclose(magnitude, parts(theirs[name])[2], rtol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_base_begins_as_itself_and_learns(models: tiny.Models, dtype: str, quantization: str) -> None:
    """To the digit: the magnitudes are the norms in float32."""
    base = models.base("llama", dtype=dtype, quantization=quantization, **tiny.WIDE)
    ids = torch.tensor([[5, 9, 2, 77, 40, 41], [8, 8, 30, 12, 0, 3]])
    rows, columns = torch.tensor([0, 1]), torch.tensor([3, 2])
    with packed(base, lora_dropout=0.3) as (pack, adapter):
        untouched = pack.token_nll(ids, rows, columns, None)
        for keys in (None, KEYS):
            pack.occupy(0, adapter)
            assert torch.equal(pack.token_nll(ids, rows, columns, PackedRows((0,), keys)), untouched)
            pack.occupy(0, moved(adapter))
            nll = pack.token_nll(ids, rows, columns, PackedRows((0,), keys))
            assert not torch.allclose(nll.detach(), untouched, rtol=1e-2)
            pack.zero_gradients()
            nll.sum().backward()
            gradients = {name: tuple(map(torch.zeros_like, ours)) for name, ours in adapter.weights.items()}
            pack.collect({0: gradients})
            assert all(bool(part.any()) for ours in gradients.values() for part in ours)


class MaskedBy(nn.Module):
    """Our masks in the place of PEFT's dropout."""

    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        self.key, self.rate = zlib.crc32(name.encode()), rate

    def forward(self, x: Tensor) -> Tensor:
        mask = dropout_mask(KEYS, module=self.key, length=x.shape[1], width=x.shape[2], rate=self.rate)
        return x * mask / (1 - self.rate)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_pefts(
    models: tiny.Models, tmp_path: Path, shape: tiny.Shape, rate: float
) -> None:
    ids = torch.tensor([[5, 9, 2, 77, 40, 41], [8, 8, 30, 12, 0, 3]])
    rows, columns = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 5, 1, 4])
    with packed(models.base(shape), lora_dropout=rate, lora_r=6, use_rslora=True) as (pack, start):
        adapter = moved(start)
        write_adapter(tmp_path, adapter)
        pack.occupy(0, adapter)
        ours = pack.token_nll(ids, rows, columns, PackedRows((0,), KEYS))
        pack.zero_gradients()
        ours.sum().backward()
        gradients = {name: tuple(map(torch.zeros_like, part)) for name, part in adapter.weights.items()}
        pack.collect({0: gradients})
    wrapped = PeftModel.from_pretrained(models.plain(shape), str(tmp_path), is_trainable=True)
    layers = lora_layers(wrapped)
    for name, layer in layers.items():
        layer.train()
        layer.lora_dropout["default"] = MaskedBy(name, rate) if rate else nn.Identity()
    logits = wrapped(input_ids=ids).logits[rows, columns - 1]
    theirs = nn.functional.cross_entropy(logits, ids[rows, columns], reduction="none")
    theirs.sum().backward()
    assert torch.allclose(ours, theirs, rtol=1e-4)
    assert gradients.keys() == layers.keys()
    for name, mine in gradients.items():
        for gradient, part in zip(mine, parts(layers[name]), strict=True):
            assert part.grad is not None
            assert float((gradient - part.grad).norm()) < 1e-4 * float(part.grad.norm())


def test_passes_begin_at_zero(models: tiny.Models) -> None:
    """A pass that failed leaves nothing in the gradients of the next."""
    ids, rows, columns = torch.tensor([[5, 9, 2, 77]]), torch.tensor([0]), torch.tensor([3])
    found = []
    with packed(models.base("llama")) as (pack, adapter):
        pack.occupy(0, moved(adapter))
        for _ in range(2):
            pack.zero_gradients()
            pack.token_nll(ids, rows, columns, PackedRows((0,))).sum().backward()
            gradients = {name: tuple(map(torch.zeros_like, ours)) for name, ours in adapter.weights.items()}
            pack.collect({0: gradients})
            found.append(gradients)
    for name, first in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(first, found[1][name], strict=True))


def test_comes_back_from_pefts_files(models: tiny.Models, tmp_path: Path) -> None:
    with packed(models.base("llama")) as (_, start):
        adapter = moved(start)
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert read.config.use_dora
    assert read.weights.keys() == adapter.weights.keys()
    for name, ours in adapter.weights.items():
        assert all(torch.equal(a, b) for a, b in zip(ours, read.weights[name], strict=True))


def test_weights_that_cannot_be_read() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"use_dora: .*Linear of torch\.uint8"):
        weight_norm(layer, torch.zeros(2, 4), torch.zeros(3, 2), scale=1.0)


def lora_config_of(adapter: Adapter) -> object:
    """The same configuration for another model: PEFT writes into it."""
    assert adapter.config.use_dora
    return lora_config(tiny.hyperparameters(use_dora=True), base_path="somewhere")
