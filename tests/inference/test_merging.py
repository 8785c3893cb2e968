"""A merged model, saved and loaded by transformers alone, says what base and adapter say in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests import tiny
from tuner.adapters import Adapter, Pack, initial_adapter, load_base, write_adapter
from tuner.adapters.initial import lora_config, meta_copy
from tuner.config import ModelSpec
from tuner.errors import CheckpointError
from tuner.inference.export import export_merged, merged_model

IDS = torch.arange(20)[None] * 3


@dataclass(frozen=True)
class Case:
    """A base, an adapter for it, and what its layers are once merged."""

    shape: tiny.Shape
    quantization: str = "none"
    flags: dict[str, bool] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    layer: type[nn.Module] = nn.Linear
    tolerance: float = 1e-4
    """On logits of a size of about 5. 8-bit products round the activations too, which nothing merged does."""

    def __str__(self) -> str:
        return "-".join([self.shape, self.quantization, *self.flags])


CASES = (
    Case("llama", flags={"use_rslora": True}),
    Case("qwen2", flags={"use_dora": True}),
    Case("gpt2", flags={"use_dora": True, "use_rslora": True}, layer=Conv1D),
    Case("llama", "nf4", flags={"use_dora": True}, changes=tiny.WIDE),
    Case("gpt2", "nf4", changes={"n_embd": 64}, layer=Conv1D),
    Case("llama", "int8", changes=tiny.WIDE, tolerance=0.5),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny.Models:
    return tiny.Models(tmp_path_factory.mktemp("models"))


def trained(spec: ModelSpec, **flags: bool) -> Adapter:
    """An adapter as after training: a large part of what the model says."""
    base = load_base(spec, device="cpu", max_length=8)
    trial = tiny.hyperparameters(lora_r=3, lora_alpha=6.0, **flags)  # type: ignore[arg-type]
    start = initial_adapter(
        meta_copy(base, base_path=spec.path), lora_config(trial, base_path=spec.path), seed=0
    )
    if start.config.use_dora:
        pack = Pack(base, num_slots=1, max_rank=3, modules=start.weights)
        start = pack.with_magnitudes(start)
        pack.close()
    draw = torch.Generator().manual_seed(1)
    weights = {
        name: (
            a,
            torch.randn(b.shape, generator=draw) * 0.1,
            *(m * (1 + 0.2 * torch.rand(m.shape, generator=draw)) for m in magnitude),
        )
        for name, (a, b, *magnitude) in start.weights.items()
    }
    return Adapter(start.config, weights)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Without the weights that bitsandbytes packs for inference: of those PEFT cannot take DoRA's norm."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    said: Tensor = model(input_ids=IDS).logits
    return said


def export(tmp_path: Path, spec: ModelSpec, adapter: Adapter, dtype: str) -> PreTrainedModel:
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    write_adapter(tmp_path / "adapter", adapter)
    tokenizer = tiny.byte_level()
    export_merged(tmp_path / "adapter", tmp_path / "merged", model=spec, tokenizer=tokenizer, dtype=dtype)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    return loaded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_says_what_peft_says(models: tiny.Models, tmp_path: Path, case: Case) -> None:
    spec = tiny.model_spec(models.path(case.shape, **case.changes), quantization=case.quantization)
    adapter = trained(spec, **case.flags)
    merged = export(tmp_path, spec, adapter, "float32")
    base = load_base(spec, device="cpu", max_length=8).model
    untouched = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert float((logits(merged) - expected).abs().max()) < case.tolerance
    assert float((untouched - expected).abs().max()) > 1
    assert {type(merged.get_submodule(name)) for name in adapter.weights} == {case.layer}
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.config.tie_word_embeddings == (case.shape in ("qwen2", "gpt2"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_rounded_once(models: tiny.Models, tmp_path: Path, dtype: str) -> None:
    """Also those of a base whose own weights are rounded otherwise."""
    spec = tiny.model_spec(models.path("llama"), dtype="bfloat16")
    adapter = trained(spec)
    export(tmp_path, spec, adapter, dtype)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in weights.values()} == {wanted}
    before = load_file(models.path("llama") / "model.safetensors")
    for name, (a, b) in adapter.weights.items():
        exact = before[f"{name}.weight"].bfloat16().float() + adapter.scale * b @ a
        difference = (weights[f"{name}.weight"].float() - exact).abs()
        assert bool((difference <= exact.abs() * torch.finfo(wanted).eps * 0.51 + 1e-6).all())


def test_a_gguf_base(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    (tmp_path / "base").mkdir()
    write_gguf(gguf, tmp_path / "base" / "model.gguf")
    spec = tiny.model_spec(tmp_path / "base", gguf_file="model.gguf")
    adapter = trained(spec)
    merged = export(tmp_path, spec, adapter, "float32")
    base = load_base(spec, device="cpu", max_length=8).model
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    assert float((logits(merged) - expected).abs().max()) < 1e-4
    said = capfd.readouterr()
    assert "it/s" not in said.out + said.err  # no progress bar: it would fill a log
    assert "Converting" not in said.out + said.err


def write_gguf(gguf: Any, path: Path) -> None:
    """A Llama of one layer with 64 words."""
    draw = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    block = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    block |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes = {"token_embd": (64, 32), "output": (64, 32)} | {f"blk.0.{name}": s for name, s in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (torch.randn(shape, generator=draw) * 0.2).numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_adapter_of_another_model(models: tiny.Models) -> None:
    adapter = trained(tiny.model_spec(models.path("gpt2")))
    with pytest.raises(CheckpointError, match=r"weights for transformer\.h\.0.*has no such layer"):
        merged_model(tiny.model_spec(models.path("llama")), adapter, dtype=torch.float32)
