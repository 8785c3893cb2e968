from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig
from safetensors.torch import load_file

from tests import tiny
from tuner.adapters import Adapter, Pack, PackedRows, initial_adapter, read_adapter, write_adapter
from tuner.adapters.initial import lora_config, meta_copy
from tuner.errors import CheckpointError


@pytest.fixture(scope="module", params=tiny.SHAPES)
def shape(request: pytest.FixtureRequest) -> tiny.Shape:
    found: tiny.Shape = request.param
    return found


def trained(models: tiny.Models, shape: tiny.Shape) -> Adapter:
    """An adapter as after training: B is not zero; what is written are slices of something larger."""
    base = models.base(shape)
    meta_model = meta_copy(base, base_path=base.model.name_or_path)
    trial = tiny.hyperparameters(lora_r=3, lora_alpha=6.0, use_rslora=True, lora_dropout=0.25)
    start = initial_adapter(meta_model, lora_config(trial, base_path=base.model.name_or_path), seed=0)
    weights = {
        name: (torch.randn(5, a.shape[1])[:3], torch.randn(5, b.shape[0])[:3].t())
        for name, (a, b) in start.weights.items()
    }
    return Adapter(start.config, weights)


def test_comes_back_whole(models: tiny.Models, shape: tiny.Shape, tmp_path: Path) -> None:
    adapter = trained(models, shape)
    write_adapter(tmp_path, adapter)
    read = read_adapter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert read.scale == adapter.scale
    assert read.config.lora_dropout == 0.25
    assert read.weights.keys() == adapter.weights.keys()
    for name, (a, b) in adapter.weights.items():
        assert torch.equal(read.weights[name][0], a)
        assert torch.equal(read.weights[name][1], b)


def test_other_weights_under_the_same_configuration(models: tiny.Models, tmp_path: Path) -> None:
    adapter = trained(models, "llama")
    other = {name: (a * 2, b * 3) for name, (a, b) in adapter.weights.items()}
    write_adapter(tmp_path, adapter, other)
    read = read_adapter(tmp_path)
    assert all(torch.equal(read.weights[name][1], b) for name, (_, b) in other.items())


def test_keys_and_configuration_are_as_peft_writes_them(
    models: tiny.Models, shape: tiny.Shape, tmp_path: Path
) -> None:
    """Written again by PEFT after loading: the same tensors under the same names."""
    adapter = trained(models, shape)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", adapter)
    assert not adapter.config.inference_mode
    model = PeftModel.from_pretrained(models.plain(shape), str(tmp_path / "ours"))
    model.save_pretrained(str(tmp_path / "theirs"))
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_init": "orthogonal", "lora_r": 4},
        {"lora_init": "eva"},
        {"target_modules": r".*layers\.(0|1)\..*(q|down)_proj"},
        {"layers_to_transform": (1,)},
        {"layers_to_transform": (0,), "target_modules": ("q_proj", "v_proj"), "use_dora": True},
    ],
    ids=str,
)
def test_peft_computes_what_a_pack_computes(
    models: tiny.Models, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Of an adapter as after training, from its directory."""
    base = models.base("llama")
    meta_model = meta_copy(base, base_path=base.model.name_or_path)
    config = lora_config(tiny.hyperparameters(**changes), base_path=base.model.name_or_path)
    start = initial_adapter(meta_model, config, seed=0)
    pack = Pack(base, num_slots=1, max_rank=config.r, modules=start.weights)
    try:
        start = pack.with_magnitudes(start)
        weights = {
            name: (a, b + 0.1 * torch.randn(b.shape), *m) for name, (a, b, *m) in start.weights.items()
        }
        adapter = Adapter(config, weights)
        write_adapter(tmp_path, adapter)
        pack.occupy(0, read_adapter(tmp_path))
        ids = torch.arange(40).view(2, 20)
        with torch.no_grad(), pack.holding(PackedRows((0,))):
            ours = base.model(input_ids=ids, use_cache=False).logits
    finally:
        pack.close()
    model = PeftModel.from_pretrained(models.plain("llama"), str(tmp_path))
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits
    assert (theirs - plain).norm() > 1e-2 * plain.norm()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(models: tiny.Models, tmp_path: Path, missing: str) -> None:
    write_adapter(tmp_path, trained(models, "llama"))
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match="not a PEFT adapter directory"):
        read_adapter(tmp_path)


def test_damaged_file(models: tiny.Models, tmp_path: Path) -> None:
    write_adapter(tmp_path, trained(models, "llama"))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a PEFT adapter directory"):
        read_adapter(tmp_path)


def test_adapters_that_are_not_lora(models: tiny.Models, tmp_path: Path) -> None:
    write_adapter(tmp_path, trained(models, "llama"))
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2).save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match="tuner reads LoRA"):
        read_adapter(tmp_path)
