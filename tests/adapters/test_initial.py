"""A new adapter is PEFT's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tuner.adapters import Adapter, Base, initial_adapter, largest_adapter
from tuner.adapters.initial import adapter_sizes, lora_config, meta_copy, targeted_modules
from tuner.config import ModelSpec
from tuner.errors import ModelError
from tuner.records import Choices, Fixed, Range

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def started(base: Base, *, seed: int = 0, **changes: Any) -> Adapter:
    meta_model = meta_copy(base, base_path=base.model.name_or_path)
    config = lora_config(tiny.hyperparameters(**changes), base_path=base.model.name_or_path)
    return initial_adapter(meta_model, config, seed=seed)


def by_peft(model: Any, *, seed: int, **changes: Any) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    config = lora_config(tiny.hyperparameters(**changes), base_path=model.name_or_path)
    wrapped = get_peft_model(model, config)
    return {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in wrapped.base_model.model.named_modules()
        if isinstance(module, LoraLayer)
    }


def assert_equal(ours: Mapping[str, tuple[Tensor, Tensor]], theirs: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for name, pair in theirs.items():
        for mine, expected in zip(ours[name], pair, strict=True):
            assert mine.dtype == expected.dtype == torch.float32
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_equals_get_peft_model(models: tiny.Models, shape: tiny.Shape, dtype: str) -> None:
    for changes in ({}, {"lora_init": "gaussian", "lora_r": 3, "lora_dropout": 0.1, "use_rslora": True}):
        model = AutoModelForCausalLM.from_pretrained(models.path(shape), dtype=DTYPES[dtype])
        adapter = started(models.base(shape, dtype=dtype), seed=7, **changes)
        assert_equal(adapter.weights, by_peft(model, seed=7, **changes))
        assert all(not b.any() for _, b in adapter.weights.values())
        assert len(adapter.weights) == {"gpt2": 8}.get(shape, 14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_orthogonal_is_pefts_and_leaves_the_base_model(
    models: tiny.Models, shape: tiny.Shape, dtype: str
) -> None:
    """B is not 0, but B A is, up to the rounding of A and B to the base model's dtype."""
    model = AutoModelForCausalLM.from_pretrained(models.path(shape), dtype=DTYPES[dtype])
    before = {name.split(".weight")[0]: p.detach().clone() for name, p in model.named_parameters()}
    adapter = started(models.base(shape, dtype=dtype), seed=7, lora_init="orthogonal")
    assert_equal(adapter.weights, by_peft(model, seed=7, lora_init="orthogonal"))
    assert not adapter.has_zero_b
    assert started(models.base(shape, dtype=dtype), lora_init="gaussian").has_zero_b
    rounding = torch.finfo(DTYPES[dtype]).eps
    for name, (a, b) in adapter.weights.items():
        assert (b @ a).norm() < 2 * rounding * a.norm() * b.norm()
        assert torch.equal(model.get_submodule(name).base_layer.weight, before[name])


def test_regular_expressions_and_layers(models: tiny.Models) -> None:
    """As PEFT reads them; PEFT has no numbers of layers beside all-linear, so the names are written out."""
    regex = r"model\.layers\.1\..*(q|up)_proj"
    for changes, others, count in (
        ({"target_modules": regex}, {"target_modules": regex}, 2),
        (
            {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (1,)},
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
            2,
        ),
        (
            {"layers_to_transform": (0,)},
            {"target_modules": r"model\.layers\.0\..*_proj"},
            7,
        ),
    ):
        adapter = started(models.base("llama"), seed=3, **changes)
        torch.manual_seed(3)
        model = get_peft_model(models.plain("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", **others))
        theirs = {
            name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
            for name, module in model.base_model.model.named_modules()
            if isinstance(module, LoraLayer)
        }
        assert len(theirs) == count
        assert_equal(adapter.weights, theirs)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",), ("q_proj",)])
def test_layers_that_the_model_lacks_are_refused(models: tiny.Models, targets: Any) -> None:
    shape: tiny.Shape = "gpt2" if targets == ("c_attn",) else "llama"
    with pytest.raises(ModelError, match=r"layers_to_transform: the model has layers 0 to 1; got 2, 7"):
        started(models.base(shape), target_modules=targets, layers_to_transform=(1, 2, 7))


def test_sizes_follow_the_layers(models: tiny.Models) -> None:
    meta_model = meta_copy(models.base("llama"), base_path="somewhere")
    space = {"lora_r": Fixed(4), "target_modules": Fixed("all-linear")}
    some, every = Choices(((0,), (0, 1))), Choices(("all", (1,)))
    one, both = adapter_sizes(meta_model, space | {"layers_to_transform": some})
    assert (2 * one, both) == (both, adapter_sizes(meta_model, space)[1])
    assert adapter_sizes(meta_model, space | {"layers_to_transform": every}) == (one, both)
    narrow = space | {"layers_to_transform": Fixed((1,)), "target_modules": Fixed(("q_proj",))}
    assert targeted_modules(meta_model, narrow) == {"model.layers.1.self_attn.q_proj"}


def test_equals_get_peft_model_on_a_4_bit_base(models: tiny.Models) -> None:
    """PEFT does not round an adapter on a quantised layer."""
    model = AutoModelForCausalLM.from_pretrained(
        models.path("llama", **tiny.WIDE),
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    base = models.base("llama", dtype="bfloat16", quantization="nf4", **tiny.WIDE)
    assert_equal(started(base, seed=1).weights, by_peft(model, seed=1))


def test_some_modules(models: tiny.Models) -> None:
    adapter = started(models.base("llama"), target_modules=("q_proj", "layers.1.mlp.up_proj"))
    assert set(adapter.weights) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_same_from_the_same_meta_copy(models: tiny.Models) -> None:
    """Making one leaves nothing behind for the next, and nothing in the random state."""
    meta_model = meta_copy(models.base("llama"), base_path="somewhere")
    modules = [type(module) for module in meta_model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = [
        initial_adapter(
            meta_model, lora_config(tiny.hyperparameters(lora_r=r), base_path="somewhere"), seed=seed
        )
        for r, seed in ((4, 0), (8, 1), (4, 0))
    ]
    assert torch.equal(torch.rand(3), expected)
    assert [type(module) for module in meta_model.modules()] == modules
    assert_equal(made[2].weights, dict(made[0].weights))
    assert not torch.equal(
        made[0].weights["model.layers.0.mlp.up_proj"][0], made[1].weights["model.layers.0.mlp.up_proj"][0][:4]
    )


def test_meta_copy_takes_no_memory(models: tiny.Models) -> None:
    meta_model = meta_copy(models.base("llama"), base_path="somewhere")
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for p in meta_model.parameters()
        if not p.is_meta
    }
    assert sum(held.values()) < 1000


@pytest.mark.parametrize(
    "targets",
    [("nothing",), ("input_layernorm",), ("embed_tokens",), ("lm_head",), ("q_proj", "lm_head")],
)
def test_what_cannot_be_adapted_is_refused(models: tiny.Models, targets: tuple[str, ...]) -> None:
    """The head, too: its output is not computed for all tokens, so an adapter there would never learn."""
    base = models.base("llama")
    meta_model = meta_copy(base, base_path="somewhere")
    config = lora_config(tiny.hyperparameters(target_modules=targets), base_path="somewhere")
    with pytest.raises(ModelError, match=r"^hyperparameters\.target_modules: "):
        initial_adapter(meta_model, config, seed=0)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ("q_prj", "v_proj"),
            r"the model has no q_prj; did you mean q_proj\? Its linear layers: down_proj, ",
        ),
        (("q_proj", "c_attn", "Wqkv"), r"the model has no Wqkv, c_attn\. Its linear layers: "),
        (("q_proj", "layers.9.mlp.up_proj"), r"the model has no layers\.9\.mlp\.up_proj"),
        (("roj",), r"the model has no roj"),
    ],
)
def test_a_name_that_no_module_has_is_refused(
    models: tiny.Models, targets: tuple[str, ...], said: str
) -> None:
    """PEFT would adapt the other names alone."""
    with pytest.raises(ModelError, match=rf"^hyperparameters\.target_modules: {said}"):
        started(models.base("llama"), target_modules=targets)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 16), (True, 8 / 4)])
def test_scale(models: tiny.Models, rslora: bool, scale: float) -> None:
    assert started(models.base("llama"), lora_r=16, lora_alpha=8.0, use_rslora=rslora).scale == scale


def test_largest_adapter(models: tiny.Models) -> None:
    """From the configuration alone: the widest targets at the largest rank."""
    space = {
        "lora_r": Range(2, 6, integer=True),
        "target_modules": Choices((("q_proj",), "all-linear", ("v_proj",))),
        "learning_rate": Fixed(1e-4),
    }
    adapter = started(models.base("llama"), lora_r=6)
    size = sum(a.numel() + b.numel() for a, b in adapter.weights.values())
    assert largest_adapter(tiny.model_spec(models.path("llama")), space) == size
    magnitudes = sum(len(b) for _, b in adapter.weights.values())
    with_dora = space | {"use_dora": Choices((False, True))}
    assert largest_adapter(tiny.model_spec(models.path("llama")), with_dora) == size + magnitudes
    meta_model = meta_copy(models.base("llama"), base_path="somewhere")
    always = adapter_sizes(meta_model, space | {"use_dora": Fixed(True)})[0]
    assert always > adapter_sizes(meta_model, with_dora)[0] == adapter_sizes(meta_model, space)[0]


def test_targeted_modules_are_those_of_any_trial(models: tiny.Models) -> None:
    meta_model = meta_copy(models.base("gpt2"), base_path="somewhere")
    space = {"target_modules": Choices((("c_attn",), ("h.0.mlp.c_fc",)))}
    assert targeted_modules(meta_model, space) == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
        "transformer.h.0.mlp.c_fc",
    }


def test_a_model_whose_code_comes_along_is_measured_without_being_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `study check` does, where no model of this process has made its class known."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = {**tiny.config("llama").to_dict(), "model_type": "own", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    space = {"lora_r": Fixed(2), "target_modules": Fixed("all-linear")}
    model = ModelSpec(path=str(tmp_path), trust_remote_code=True)
    (tmp_path / "plain").mkdir()
    tiny.config("llama").save_pretrained(tmp_path / "plain")
    plain = ModelSpec(path=str(tmp_path / "plain"))
    assert largest_adapter(model, space) == largest_adapter(plain, space) > 0
