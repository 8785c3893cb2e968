from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig, PhimoeConfig, PreTrainedConfig, Qwen3MoeConfig

from tests import tiny
from tests.data.tiny import source, write_jsonl
from tests.training.test_loop import small_memory, with_room_for
from tuner.adapters.initial import largest_adapter
from tuner.api.check import packing_remarks
from tuner.config import RoundSpec
from tuner.data import PreparedData, load_tokenizer, prepare
from tuner.errors import ModelError
from tuner.records import Choices, Fixed, Prediction, Range, TimesSqrtRank, from_json, to_json
from tuner.training.memory_budget import largest_hyperparameters, predict, probe, tokens_of_update
from tuner.training.startup import arrange, packing_for, predict_packed


def test_largest_takes_the_most_memory() -> None:
    space = {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "lora_r": Choices((8, 64, 16)),
        "batch_size": Range(2, 9, integer=True),
        "lora_alpha": TimesSqrtRank(4.0),
        "schedule": Choices(("cosine", "linear")),
        "lora_dropout": Choices((0.0, 0.1, 0.05)),
        "optimizer": Fixed("adamw"),
    }
    chosen = largest_hyperparameters(space)
    assert (chosen["lora_r"], chosen["batch_size"]) == (64, 9)
    assert (chosen["schedule"], chosen["optimizer"]) == ("cosine", "adamw")
    assert chosen["lora_dropout"] == 0.1
    assert isinstance(chosen["lora_alpha"], float)
    assert isinstance(chosen["batch_size"], int)


def test_probe_times_a_trial_and_leaves_nothing(models: tiny.Models, tmp_path: Path) -> None:
    spec, data = _round(models, tmp_path)
    before = set(tmp_path.iterdir())
    state = arrange(spec, data, slots=3)
    predicted = predict(state, spec)
    assert predicted.slots == 3
    # No update of two layers takes a tenth of a millisecond, and no evaluation of a few rows.
    assert min(predicted.seconds_per_step, predicted.seconds_per_evaluation) > 1e-4
    assert predicted.peak_memory_bytes > 10 * 2**20
    (probed,) = probe(state, largest_hyperparameters(spec.space()))
    longest = int(data.train.num_tokens.max())
    assert state.joins_rows  # a pass is as long as the rows together, for each of three trials
    assert list(probed.tokens) == sorted(set(probed.tokens))
    assert all(tokens % 3 == 0 and tokens >= 3 * longest for tokens in probed.tokens)
    assert min(probed.seconds) > 0
    assert set(tmp_path.iterdir()) == before


def test_auto_is_one_slot_on_a_cpu_and_a_probe_says_what_packing_is_worth(
    models: tiny.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, data = _round(models, tmp_path)
    state = arrange(spec, data, slots="auto")
    assert state.pack.num_slots == 1
    alone = predict(state, spec)
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1 << 20))
    assert predict_packed(state, spec, alone) == alone
    # What files occupy in memory is there for whoever asks.
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(free=0, available=1 << 40))
    both = predict_packed(state, spec, alone)
    assert both.packed_slots == min(4, spec.num_trials) > 1
    assert both.packing_gain == alone.seconds_per_step / both.packed_seconds_per_step  # type: ignore[operator]
    assert replace(both, packed_slots=None, packed_seconds_per_step=None) == alone
    three = predict(arrange(spec, data, slots=3), spec)
    assert predict_packed(arrange(spec, data, slots=3), spec, three) == three


def test_packing_is_proposed_where_it_is_faster() -> None:
    faster = Prediction(1, 0.13, 0.1, 100, packed_slots=4, packed_seconds_per_step=0.1)
    (said,) = packing_remarks(faster)
    assert "packing 4 trials would be 1.3 times as fast here: run.slots: 4, or --slots 4" in said
    (said,) = packing_remarks(replace(faster, packed_seconds_per_step=0.13))
    assert "would not be faster here (1.0 times)" in said
    assert not list(packing_remarks(Prediction(4, 0.1, 0.1, 100)))
    assert from_json(Prediction, to_json(faster)) == faster


@pytest.mark.parametrize("probed", [1, 2])
def test_auto_fills_a_pass_as_far_as_memory_goes(models: tiny.Models, tmp_path: Path, probed: int) -> None:
    """As on a GPU: these rows are so short that a pass has room for every trial, if memory has."""
    spec, data = _round(models, tmp_path)
    state = arrange(spec, data, slots=probed)
    assert packing_for(state, spec, limits=[1 << 50]).slots == spec.num_trials == 4
    assert packing_for(state, spec, limits=[1 << 20]).slots == 1


def test_slots_are_reckoned_with_the_padding_of_an_update(models: tiny.Models, tmp_path: Path) -> None:
    """One row in ten is long: a grid is padded to it, joined rows hardly."""
    texts = [f"Row {n}." * (8 if n % 10 == 0 else 1) for n in range(60)]
    spec, data = _round(models, tmp_path, texts=texts)
    lengths = data.train.num_tokens
    assert lengths.max() > 4 * lengths.min()
    state = arrange(spec, data, slots=2)
    assert state.joins_rows
    joined, real = tokens_of_update(state, 24), 24 * float(lengths.mean())
    assert 0.9 * real < joined < 1.3 * real
    state.base.joins_rows = False
    assert tokens_of_update(state, 24) == 24 * lengths.max() > 2 * joined


def test_a_row_that_does_not_fit_is_no_prediction(models: tiny.Models, tmp_path: Path) -> None:
    spec, data = _round(models, tmp_path)
    state = arrange(spec, data, slots=2)
    state.base = with_room_for(state.base, lambda ids: not torch.is_grad_enabled())
    with pytest.raises(ModelError, match="no room for a pass of even one row"):
        predict(state, spec)


def test_memory_without_room_for_the_slots_is_said(models: tiny.Models, tmp_path: Path) -> None:
    """When the pack is made, and when a probe fills its slots."""
    spec, data = _round(models, tmp_path)
    state = arrange(spec, data, slots=2)
    small_memory(state, most=1)
    with pytest.raises(ModelError, match=r"run\.slots: with 2 slot\(s\), memory has no room"):
        predict(state, spec)
    with SmallMemory(), pytest.raises(ModelError, match=r"run\.slots: with 7 slot\(s\), memory has no room"):
        arrange(spec, data, slots=7)


class SmallMemory(TorchFunctionMode):
    """Memory that ends at the first tensor of zeros as large as the weights of seven slots."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        if function is torch.zeros and made.numel() > 7 * 1000:
            raise torch.OutOfMemoryError("artificial limit")
        return made


def test_layers_that_a_pack_cannot_wrap_are_refused_at_once(models: tiny.Models, tmp_path: Path) -> None:
    """Phi 3.5's routers are linear layers with two results, and all-linear takes them, too."""
    shape = {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
    made = PhimoeConfig(
        **tiny.config("llama").to_diff_dict() | {"model_type": "phimoe", "architectures": None} | shape
    )
    spec, data = _round(models, tmp_path, model=tiny.save_model(tmp_path / "phimoe", made))
    with pytest.raises(
        ModelError, match=r"target_modules: (.* takes )?model\.layers\.0\.mlp\.router"
    ) as caught:
        arrange(spec, data, slots=1)
    _takes_what_is_named(str(caught.value), spec, data)


@pytest.mark.parametrize("kind", [Qwen3MoeConfig, MixtralConfig])
def test_experts_are_refused_with_the_layers_to_name(
    models: tiny.Models, tmp_path: Path, kind: Callable[..., PreTrainedConfig]
) -> None:
    """Stacked experts are no linear layers, and PEFT's all-linear takes them."""
    shared = tiny.config("llama").to_diff_dict()
    for key in ("model_type", "architectures", "head_dim"):
        shared.pop(key, None)
    experts = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    made = kind(**shared, **experts, decoder_sparse_step=1, output_router_logits=False)
    spec, data = _round(models, tmp_path, model=tiny.save_model(tmp_path / "moe", made))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(ModelError) as caught:
            largest_adapter(spec.model, spec.space())
    said = str(caught.value)
    assert re.match(
        r"hyperparameters\.target_modules: all-linear .* takes model\.layers\.0\.mlp\.\w+, which", said
    )
    _takes_what_is_named(said, spec, data)


def _takes_what_is_named(said: str, spec: RoundSpec, data: PreparedData) -> None:
    """The remedy is one."""
    line = said.partition("as `target_modules: [")[2].partition("]`")[0]
    names = line.split(", ")
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {*names}
    written = {"target_modules": names, "lora_r": [2, 4], "batch_size": [1, 2], "learning_rate": 1e-4}
    named = RoundSpec.model_validate(spec.model_dump() | {"hyperparameters": written})
    state = arrange(named, data, slots=2)
    assert state.pack.slot_weights > 0
    state.pack.close()


def _round(
    models: tiny.Models, directory: Path, *, model: Path | None = None, texts: Sequence[str] = ()
) -> tuple[RoundSpec, PreparedData]:
    texts = texts or [f"Row number {n}." for n in range(30)]
    rows = write_jsonl(directory / "rows.jsonl", [{"text": text} for text in texts])
    spec = RoundSpec.model_validate(
        {
            "study": "s",
            "round": "r",
            "model": {"path": str(model or models.path("llama")), "dtype": "float32"},
            "data": {"train": [source(rows, "text")], "eval_fraction": 0.2, "max_length": tiny.MAX_LENGTH},
            "max_train_steps": 1000,
            "hyperparameters": {"learning_rate": 1e-4, "lora_r": [2, 4], "batch_size": [1, 2]},
            "evaluation": {"every_steps": 100},
        }
    )
    return spec, prepare(spec, load_tokenizer(spec.model), None)
