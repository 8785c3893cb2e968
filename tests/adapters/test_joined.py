"""Joined rows are the padded grid: losses, gradients and dropout, whatever lies beside an example."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconMambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from tests import tiny
from tests.adapters.test_pack import STEP, adapter, packed
from tests.adapters.test_token_grid import rows
from tuner.adapters import Base, PackedRows, joined
from tuner.adapters.base import freeze, load_base, load_model
from tuner.adapters.evaluation import TokenGrid, grid, join
from tuner.adapters.frozen_linear import row_keys
from tuner.adapters.joined import joined_rows, predicting_places
from tuner.data import Example
from tuner.errors import ModelError

CPU = torch.device("cpu")
SHAPES: tuple[tiny.Shape, ...] = ("llama", "qwen2", "gpt2")
SLOTS = st.lists(st.lists(rows(), min_size=1, max_size=4), min_size=1, max_size=4)


@given(slots=SLOTS, max_grids=st.integers(1, 3), multiple=st.sampled_from([1, 4]))
def test_every_token_has_a_place_of_its_own(
    slots: list[list[Example]], max_grids: int, multiple: int
) -> None:
    (ids, target_rows, columns, positions, numbers, places, starts), shapes = joined_rows(
        slots, max_grids=max_grids, multiple=multiple
    )
    lengths = [[len(example.input_ids) for example in part] for part in slots]
    assert ids.shape == (len(slots), max(map(sum, lengths)))
    assert len(shapes) <= max_grids
    assert all(length % multiple == 0 for _, length in shapes)
    size = sum(height * length for height, length in shapes)
    assert len(set(places.tolist())) == places.size
    assert 0 <= places.min() <= places.max() < size
    assert starts.dtype == np.int32
    assert (starts[0], starts[-1]) == (0, ids.size)
    assert 0 < np.diff(starts).min() <= np.diff(starts).max() <= max(length for _, length in shapes)
    height = max(len(part) for part in slots)
    expected = set()
    for slot, part in enumerate(slots):
        start = 0
        for place, example in enumerate(part):
            here = slice(start, start + len(example.input_ids))
            flat = slice(slot * ids.shape[1] + here.start, slot * ids.shape[1] + here.stop)
            assert ids[slot, here].tolist() == example.input_ids.tolist()
            assert positions[slot, here].tolist() == list(range(here.stop - here.start))
            assert (numbers[flat] == slot * height + place).all()
            assert (np.diff(places[flat]) == 1).all()
            assert flat.stop == starts[starts.tolist().index(flat.start) + 1]
            expected |= {(slot, start + int(column)) for column in np.flatnonzero(example.is_target)}
            start = here.stop
    assert set(zip(target_rows.tolist(), columns.tolist(), strict=True)) == expected


def test_short_rows_have_a_grid_of_their_own() -> None:
    """Where the squares saved are more than another grid costs."""
    long, short = (Example(np.zeros(size, np.int32), np.arange(size) > 0) for size in (500, 20))
    _, shapes = joined_rows([[long, *[short] * 10]], max_grids=4, multiple=16)
    assert shapes == ((1, 512), (10, 32))
    _, shapes = joined_rows([[short] * 3 + [Example(short.input_ids[:9], short.is_target[:9])]], max_grids=4)
    assert shapes == ((4, 20),)


def test_one_grid_is_not_searched_for() -> None:
    """A GPU has one, and waits for the host: a search is cubic in the lengths, here minutes."""
    rows_there = [Example(np.zeros(size, np.int32), np.arange(size) > 0) for size in range(2, 1502)]
    begun = time.process_time()
    _, shapes = joined_rows([rows_there])
    assert shapes == ((1500, 1501),)
    assert time.process_time() - begun < 2


@given(slots=SLOTS)
def test_the_tokens_before_targets(slots: list[list[Example]]) -> None:
    (ids, rows, columns, *_), _ = joined_rows(slots)
    found = predicting_places(rows, columns, ids.shape)
    needed = {int(row) * ids.shape[1] + int(column) - 1 for row, column in zip(rows, columns, strict=True)}
    if found is None:
        most = max([int((rows == slot).sum()) for slot in range(len(slots))])
        assert most == 0 or most > 0.75 * ids.shape[1]
        return
    assert needed <= set(found.tolist())
    assert len(set(found.tolist())) == len(found)
    of_slots = found.reshape(len(slots), -1) // ids.shape[1]
    assert (of_slots == np.arange(len(slots))[:, None]).all()


def losses_and_gradients(
    base: Base, laid: TokenGrid, *, num_examples: int, rate: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Summed loss of each of two slots with two adapters."""
    both = [adapter(base, seed=seed, lora_r=4 - seed, lora_dropout=rate) for seed in range(2)]
    keys = row_keys(
        torch.arange(2).repeat_interleave(num_examples), STEP, torch.arange(num_examples).repeat(2)
    )
    with packed(base, both, slots=(0, 1)) as pack:
        pack.zero_gradients()
        with pack.holding(PackedRows((0, 1), keys if rate else None, laid.joined)):
            nll = base.token_nll(laid.input_ids, laid.rows, laid.columns)
            nll.sum().backward()
        sums = [{name: tuple(map(torch.zeros_like, w)) for name, w in one.weights.items()} for one in both]
        pack.collect(dict(enumerate(sums)))
    flat = [torch.cat([part.reshape(-1) for pair in one.values() for part in pair]) for one in sums]
    return laid.sum_by_row(nll).view(2, -1).sum(1), flat


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("keeps_activations", [True, False])
def test_is_the_padded_grid(
    models: tiny.Models, shape: tiny.Shape, rate: float, keeps_activations: bool
) -> None:
    """Measured: losses 3e-7, gradients 1e-6. Without kept activations, attention runs again."""
    base = (
        models.base(shape)
        if keeps_activations
        else load_base(tiny.model_spec(models.path(shape)), device="cpu", max_length=tiny.MAX_LENGTH)
    )
    assert base.joins_rows
    assert keeps_activations or base.keep_fewer_activations()
    examples = tiny.examples(8, seed=3)[:]
    slots = [examples[:5], examples[5:8]]
    found = [
        losses_and_gradients(base, lay(slots, device=CPU), num_examples=5, rate=rate) for lay in (grid, join)
    ]
    (padded, padded_gradients), (joined, joined_gradients) = found
    assert torch.allclose(joined, padded, rtol=1e-5)
    for one, other in zip(joined_gradients, padded_gradients, strict=True):
        assert float((one - other).norm()) < 1e-5 * float(other.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_layer_sees_tokens_before_targets(models: tiny.Models, shape: tiny.Shape) -> None:
    base = models.base(shape)
    assert base.last is not None
    examples = [Example(e.input_ids, np.arange(len(e.input_ids)) > 5) for e in tiny.examples(6, seed=3)[:]]
    laid = join([examples[:3], examples[3:]], device=CPU)
    assert laid.joined is not None
    seen: list[torch.Size] = []
    product = next(module for module in base.last.modules() if hasattr(module, "weight"))
    hook = product.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    found = []
    try:
        for last in (None, base.last):
            with laid.joined.within(base.model, last=last), torch.no_grad():
                found.append(base.token_nll(laid.input_ids, laid.rows, laid.columns))
    finally:
        hook.remove()
    most = max(int((laid.rows == slot).sum()) for slot in range(2))
    assert [size[:2] for size in seen] == [laid.input_ids.shape, (2, most)]
    assert most < laid.input_ids.shape[1]
    assert torch.allclose(*found, rtol=1e-5)


class Mixes(torch.nn.Module):
    """A part that also sees the token before, and the output of another token changes."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + 1e-3 * x.roll(1, dims=1))  # type: ignore[no-any-return]


def test_a_last_layer_whose_tokens_meet_sees_all(models: tiny.Models) -> None:
    model = load_model(tiny.model_spec(models.path("llama")), device="cpu", max_length=tiny.MAX_LENGTH)
    layer = model.model.layers[-1]
    layer.mlp = Mixes(layer.mlp)
    assert freeze(model, dtype=torch.float32).last is None


def test_windows_are_the_models_own(models: tiny.Models, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Examples are longer than the window of 5."""
    config = MistralConfig(**_sizes(LlamaConfig), sliding_window=5)
    path = tiny.save_model(tmp_path_factory.mktemp("mistral"), config)
    base = load_base(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
    assert base.joins_rows
    slots = [tiny.examples(3, seed=1, shortest=8)[:], tiny.examples(2, seed=2, shortest=8)[:]]
    found = [
        losses_and_gradients(base, lay(slots, device=CPU), num_examples=3, rate=0.0)[0]
        for lay in (grid, join)
    ]
    assert torch.allclose(*found, rtol=1e-5)


def test_nothing_reaches_another_trial(models: tiny.Models) -> None:
    """Not even through filler: a trial whose weights are NaN leaves its neighbour's bits alone."""
    base = models.base("llama")
    examples = tiny.examples(6, seed=3)[:]
    laid = join([examples[:2], examples[2:6]], device=CPU)
    assert laid.joined is not None
    found = []
    for factor in (1.0, float("nan")):
        both = [adapter(base, seed=seed) for seed in range(2)]
        for pair in both[0].weights.values():
            for part in pair:
                part.mul_(factor)
        with packed(base, both, slots=(0, 1)) as pack:
            pack.zero_gradients()
            with pack.holding(PackedRows((0, 1), None, laid.joined)):
                nll = base.token_nll(laid.input_ids, laid.rows, laid.columns)
                nll.sum().backward()
            sums = {name: tuple(map(torch.zeros_like, w)) for name, w in both[1].weights.items()}
            pack.collect({1: sums})
        found.append([nll.detach()[laid.rows == 1], *(part for pair in sums.values() for part in pair)])
        assert bool(nll.detach()[laid.rows == 0].isnan().all()) == (factor != factor)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("config", [MambaConfig, FalconMambaConfig, Qwen3NextConfig, FalconConfig])
def test_models_whose_examples_meet_keep_the_grid(
    config: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny.save_model(tmp_path_factory.mktemp("leaks"), config(**_sizes(config)))
    for dtype in ("float32", "bfloat16"):
        spec = tiny.model_spec(path, dtype=dtype)
        assert not load_base(spec, device="cpu", max_length=tiny.MAX_LENGTH).joins_rows


def test_too_little_memory_does_not_pad_rows(models: tiny.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(joined, "sdpa_attention_forward", too_large)
    with pytest.raises(ModelError, match="does not fit into the memory of cpu: CUDA error: out of memory"):
        load_base(tiny.model_spec(models.path("llama")), device="cpu", max_length=tiny.MAX_LENGTH)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_precision_joins(models: tiny.Models, dtype: str, quantization: str) -> None:
    assert models.base("llama", dtype=dtype, quantization=quantization, **tiny.WIDE).joins_rows


def _sizes(config: type) -> dict[str, object]:
    common: dict[str, object] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    if config in (MambaConfig, FalconMambaConfig):
        return {
            k: common[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")
        } | {
            "state_size": 4,
            "time_step_rank": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
    if config is FalconConfig:
        return {k: v for k, v in common.items() if k != "num_key_value_heads"} | {"alibi": False}
    if config is Qwen3NextConfig:
        return common | {
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
        }
    return common
