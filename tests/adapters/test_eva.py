"""EVA's initialisation is PEFT's on the same batches, whatever else the worker holds."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model, initialize_lora_eva_weights
from torch import Tensor

from tests import tiny
from tuner.adapters import Adapter, Base, Pack, eva, initial_adapter
from tuner.adapters.eva import with_eva
from tuner.adapters.evaluation import grid
from tuner.adapters.initial import lora_config, meta_copy
from tuner.data import Examples
from tuner.errors import ModelError

TRAIN = tiny.examples(200)
SEED = 3
BFLOAT16_TOLERANCE = 0.02
"""Of a unit vector's entries: directions of inputs that were rounded to bfloat16."""


def started(base: Base, *, seed: int = SEED, train: Examples = TRAIN, **changes: Any) -> Adapter:
    trial = tiny.hyperparameters(lora_init="eva", **changes)
    config = lora_config(trial, base_path=base.model.name_or_path)
    start = initial_adapter(meta_copy(base, base_path=base.model.name_or_path), config, seed=seed)
    return with_eva(start, base, train, seed=seed)


def batches(*, seed: int) -> list[dict[str, Tensor]]:
    """The passes as a user of PEFT would write them, with masks for padding and for the prompt."""
    made = []
    for rows in itertools.islice(eva._passes(TRAIN, seed=seed), eva.EVA_MAX_PASSES):
        tokens = grid([[TRAIN[row] for row in rows]], device=torch.device("cpu"))
        labels = torch.full_like(tokens.input_ids, -100)
        labels[tokens.rows, tokens.columns] = tokens.input_ids[tokens.rows, tokens.columns]
        mask = torch.zeros_like(tokens.input_ids)
        for at, row in enumerate(rows):
            mask[at, : TRAIN.num_tokens[row]] = 1
        made.append({"input_ids": tokens.input_ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.fixture(autouse=True)
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva, "EVA_PASS_TOKENS", 512)


@pytest.mark.parametrize(("shape", "changes"), [("llama", {}), ("gpt2", {}), ("llama", {"use_dora": True})])
def test_equals_pefts_on_the_same_batches(
    models: tiny.Models, shape: tiny.Shape, changes: dict[str, Any]
) -> None:
    """To the digit in float32 on a CPU."""
    base = models.base(shape)
    ours = started(base, **changes)
    trial = tiny.hyperparameters(lora_init="eva", **changes)
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(models.plain(shape), lora_config(trial, base_path=base.model.name_or_path))
        initialize_lora_eva_weights(model, batches(seed=SEED), show_progress_bar=False)
    assert not model.peft_config["default"].rank_pattern
    assert ours.has_zero_b
    for name, (a, b, *_) in ours.weights.items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, a), name
        assert torch.equal(layer.lora_B["default"].weight, b), name
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-5)


def test_depends_on_the_seed_alone(models: tiny.Models) -> None:
    """Not on the pack around the base model, nor on the trials in it."""
    base = models.base("llama")
    alone = started(base)
    pack = Pack(base, num_slots=2, max_rank=4, modules=alone.weights)
    try:
        noisy = {name: (a, torch.ones_like(b)) for name, (a, b) in alone.weights.items()}
        pack.occupy(1, Adapter(alone.config, noisy))
        packed = with_eva(alone, base, TRAIN, seed=SEED)
        other = with_eva(alone, base, TRAIN, seed=SEED + 1)
    finally:
        pack.close()
    for name, (a, _) in alone.weights.items():
        assert torch.equal(packed.weights[name][0], a)
        assert not torch.equal(other.weights[name][0], a)
        layer = base.model.get_submodule(name)
        assert not layer._forward_hooks


def test_bfloat16(models: tiny.Models) -> None:
    exact, rounded = (started(models.base("llama", dtype=each)) for each in ("float32", "bfloat16"))
    for name, (a, _) in rounded.weights.items():
        assert a.dtype == torch.float32
        assert (a[0] - exact.weights[name][0][0]).abs().max() < BFLOAT16_TOLERANCE, name


def test_rows_of_few_targets_are_gathered(models: tiny.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of one row, with fewer targets than directions."""
    monkeypatch.setattr(eva, "EVA_PASS_TOKENS", 1)
    rows = Examples.of(row for row in TRAIN if row.is_target.sum() <= 3)
    adapter = started(models.base("llama"), train=rows, lora_r=8)
    for a, _ in adapter.weights.values():
        assert torch.allclose(a @ a.T, torch.eye(8), atol=1e-4)


def test_a_rank_above_a_layers_width_is_refused(models: tiny.Models) -> None:
    with pytest.raises(ModelError, match=r"lora_r: 33 with lora_init: eva expects at most 32"):
        started(models.base("llama"), lora_r=33)
