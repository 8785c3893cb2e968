"""Packed adapters against the plain formula, written out with autograd."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.adapters.plain_dropout import dropout_mask
from tuner.adapters import Adapter, Base, Pack, PackedRows, device_pack, initial_adapter
from tuner.adapters.frozen_linear import row_keys
from tuner.adapters.initial import lora_config, meta_copy
from tuner.data import Example

STEP = 5


def adapter(base: Base, *, seed: int, **changes: object) -> Adapter:
    """As after some training: B is not zero."""
    meta_model = meta_copy(base, base_path=base.model.name_or_path)
    trial = tiny.hyperparameters(training_seed=seed, **changes)  # type: ignore[arg-type]
    start = initial_adapter(meta_model, lora_config(trial, base_path=base.model.name_or_path), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (a, torch.randn(b.shape, generator=generator) * 0.1) for name, (a, b) in start.weights.items()
    }
    return Adapter(start.config, weights)


@contextmanager
def packed(base: Base, adapters: Sequence[Adapter], *, slots: Sequence[int]) -> Iterator[Pack]:
    modules = {name for one in adapters for name in one.weights}
    pack = Pack(base, num_slots=8, max_rank=max(one.config.r for one in adapters), modules=modules)
    for slot, one in zip(slots, adapters, strict=True):
        pack.occupy(slot, one)
    try:
        yield pack
    finally:
        pack.close()


@dataclass(frozen=True)
class Batch:
    """The same number of rows for each adapter, and which tokens count."""

    input_ids: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        ids = torch.zeros(len(examples), max(len(e.input_ids) for e in examples), dtype=torch.int64)
        chosen = []
        for row, example in enumerate(examples):
            ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
            chosen += [(row, int(column)) for column in example.is_target.nonzero()[0]]
        rows, columns = torch.tensor(chosen).T
        return cls(ids, rows, columns)


def plain_gradients(base: Base, one: Adapter, batch: Batch, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one adapter alone: y + scale * B A (mask * x / (1 - rate)), by hooks."""
    leaves = {name: [w.clone().requires_grad_() for w in pair] for name, pair in one.weights.items()}
    rate = one.config.lora_dropout

    def added(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x,) = inputs
            mask = dropout_mask(
                keys, module=zlib.crc32(name.encode()), length=x.shape[1], width=x.shape[2], rate=rate
            )
            a, b = leaves[name]
            return output + one.scale * (x * mask / (1 - rate)) @ a.T @ b.T

        return hook

    hooks = [base.model.get_submodule(name).register_forward_hook(added(name)) for name in leaves]
    logits = base.model(input_ids=batch.input_ids).logits[batch.rows, batch.columns - 1]
    for hook in hooks:
        hook.remove()
    nll = nn.functional.cross_entropy(
        logits.float(), batch.input_ids[batch.rows, batch.columns], reduction="none"
    )
    nll.sum().backward()
    gradients = {f"{name}.{i}": leaf.grad for name, pair in leaves.items() for i, leaf in enumerate(pair)}
    return nll.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("shape", tiny.SHAPES)
@pytest.mark.parametrize("slots", [(0, 1, 2), (6, 3, 7)])
def test_gradients_are_autograds_with_the_same_masks(
    models: tiny.Models, shape: tiny.Shape, slots: tuple[int, ...]
) -> None:
    base = models.base(shape)
    narrow = ("c_fc",) if shape == "gpt2" else ("q_proj", "down_proj")
    adapters = [
        adapter(base, seed=0, lora_r=4, lora_dropout=0.3),
        adapter(base, seed=1, lora_r=2, lora_dropout=0.6, use_rslora=True, target_modules=narrow),
        adapter(base, seed=2, lora_r=7, lora_alpha=3.0),
    ]
    examples = tiny.examples(6, seed=4)[:]
    keys = [row_keys(seed, STEP, torch.tensor([4, 1])) for seed in range(3)]
    expected = [
        plain_gradients(base, one, Batch.of(examples[2 * n : 2 * n + 2]), keys[n])
        for n, one in enumerate(adapters)
    ]
    batch = Batch.of(examples)
    order = sorted(range(3), key=lambda n: slots[n])
    with packed(base, adapters, slots=slots) as pack:
        batch = Batch.of([examples[2 * n + i] for n in order for i in range(2)])
        rows = PackedRows(tuple(sorted(slots)), torch.cat([keys[n] for n in order]))
        nll = pack.token_nll(batch.input_ids, batch.rows, batch.columns, rows)
        nll.sum().backward()
        for n, (expected_nll, expected_gradients) in enumerate(expected):
            mine = nll[batch.rows // 2 == order.index(n)]
            assert torch.allclose(mine, expected_nll, rtol=1e-5, atol=1e-5)
            sums = {
                name: (torch.zeros_like(a), torch.zeros_like(b))
                for name, (a, b) in adapters[n].weights.items()
            }
            pack.collect({slots[n]: sums})
            for name, pair in sums.items():
                for i, gradient in enumerate(pair):
                    wanted = expected_gradients[f"{name}.{i}"]
                    assert float((gradient - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_a_torch_without_operators_on_lists_computes_the_same(
    models: tiny.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name, operation in (("_copy_each", Tensor.copy_), ("_add_each", Tensor.add_)):
        public = device_pack._one_by_one(operation)

        def counted(*lists: Sequence[Tensor], name: str = name, public: object = public) -> None:
            calls.append(name)
            public(*lists)  # type: ignore[operator]

        monkeypatch.setattr(device_pack, name, counted)
    test_gradients_are_autograds_with_the_same_masks(models, tiny.SHAPES[0], (0, 1, 2))
    assert set(calls) == {"_copy_each", "_add_each"}


def test_a_model_finds_the_weight_and_bias_of_its_layer(models: tiny.Models) -> None:
    """Jamba takes the bias away again, and adds it elsewhere."""
    base = models.base("qwen2")
    one = adapter(base, seed=0, target_modules=("q_proj",))
    plain = {name: base.model.get_submodule(name) for name in one.weights}
    with packed(base, [one], slots=(0,)):
        for name, layer in plain.items():
            wrapped = base.model.get_submodule(name)
            assert wrapped is not layer
            assert (wrapped.weight is layer.weight, wrapped.bias is layer.bias) == (True, True)


@pytest.mark.parametrize("shape", ["qwen2", "gpt2"])
def test_a_model_may_add_to_a_layers_output_in_place(models: tiny.Models, shape: tiny.Shape) -> None:
    """Falcon does, to what comes out of a linear layer: with a bias, and of another class than nn.Linear."""
    base, batch, found = models.base(shape), Batch.of(tiny.examples(2)[:]), []
    one = adapter(base, seed=0, target_modules=("c_attn",) if shape == "gpt2" else ("q_proj",))
    with packed(base, [one], slots=(0,)) as pack:
        layers = [base.model.get_submodule(name) for name in one.weights]
        for add in (torch.Tensor.add, torch.Tensor.add_):
            hooks = [layer.register_forward_hook(lambda _, __, y, add=add: add(y, 1.0)) for layer in layers]
            pack.zero_gradients()
            nll = pack.token_nll(batch.input_ids, batch.rows, batch.columns, PackedRows((0,)))
            nll.sum().backward()
            found.append([nll.detach(), *(layer.gradient_a.clone() for layer in layers)])
            for hook in hooks:
                hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(part.any() for part in found[0])


def test_evaluation_drops_nothing(models: tiny.Models) -> None:
    base, batch = models.base("llama"), Batch.of(tiny.examples(2)[:])
    dropping, keeping = (adapter(base, seed=0, lora_dropout=rate) for rate in (0.9, 0.0))
    with packed(base, [dropping, keeping], slots=(0, 1)) as pack:
        both = Batch(batch.input_ids.repeat(2, 1), *_twice(batch))
        nll = pack.token_nll(both.input_ids, both.rows, both.columns, PackedRows((0, 1)))
    assert torch.allclose(*nll.detach().chunk(2))


def test_untouched_base(models: tiny.Models) -> None:
    """Without rows, and for a slot that is empty."""
    base, batch = models.base("llama"), Batch.of(tiny.examples(2)[:])
    expected = base.token_nll(batch.input_ids, batch.rows, batch.columns)
    with packed(base, [adapter(base, seed=0)], slots=(2,)) as pack:
        for rows in (None, PackedRows((1,))):
            assert torch.equal(pack.token_nll(batch.input_ids, batch.rows, batch.columns, rows), expected)
        both = Batch(batch.input_ids.repeat(2, 1), *_twice(batch))
        nll = pack.token_nll(both.input_ids, both.rows, both.columns, PackedRows((1, 2)))
        empty, used = nll.detach().chunk(2)
        assert torch.allclose(empty, expected, rtol=1e-5)
        assert not torch.allclose(used, expected, rtol=1e-3)
        assert torch.equal(base.token_nll(batch.input_ids, batch.rows, batch.columns), expected)


def test_close_gives_the_base_its_layers_back(models: tiny.Models) -> None:
    base = models.base("gpt2")
    before = dict(base.model.named_modules())
    with packed(base, [adapter(base, seed=0)], slots=(0,)):
        assert dict(base.model.named_modules()) != before
    assert dict(base.model.named_modules()) == before


def test_a_slot_is_emptied_before_it_is_taken(models: tiny.Models) -> None:
    base = models.base("llama")
    with packed(base, [adapter(base, seed=0, lora_r=8, lora_dropout=0.5)], slots=(1,)) as pack:
        other = adapter(base, seed=1, lora_r=2, target_modules=("q_proj",))
        pack.occupy(1, other)
        taken = {name: base.model.get_submodule(name) for name in other.weights}
        for name, layer in base.model.named_modules():
            if not hasattr(layer, "dropout_rates"):
                continue
            assert layer.dropout_rates[1] == 0.0
            assert layer.scales[1] == (other.scale if name in taken else 0.0)
            assert torch.equal(layer.a[1, :2].any(), torch.tensor(name in taken))
            assert not layer.a[1, 2:].any()
            assert not layer.b[1, 2:].any()


def test_masks_do_not_depend_on_which_modules_neighbours_adapt(models: tiny.Models) -> None:
    base, batch = models.base("llama"), Batch.of(tiny.examples(2)[:])
    one = adapter(base, seed=0, lora_dropout=0.5, target_modules=("v_proj",))
    found = []
    for others in ([], [adapter(base, seed=1)]):
        with packed(base, [one, *others], slots=range(1 + len(others))) as pack:
            rows = PackedRows((0,), row_keys(0, STEP, torch.arange(2)))
            found.append(pack.token_nll(batch.input_ids, batch.rows, batch.columns, rows).detach())
    assert torch.equal(found[0], found[1])


def test_stacked_weights_have_the_dtype_of_the_base(models: tiny.Models) -> None:
    """Master weights stay float32 with the trial; what they add is within bfloat16's rounding."""
    one = adapter(models.base("llama"), seed=0)
    batch, found = Batch.of(tiny.examples(2)[:]), []
    for dtype in ("float32", "bfloat16"):
        base = models.base("llama", dtype=dtype)
        with packed(base, [one], slots=(0,)) as pack:
            rows = PackedRows((0,))
            with torch.no_grad():
                found.append(pack.token_nll(batch.input_ids, batch.rows, batch.columns, rows).mean())
            layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
            assert layer.a.dtype == base.dtype
    assert float(found[1]) == pytest.approx(float(found[0]), rel=0.02)


def _twice(batch: Batch) -> tuple[Tensor, Tensor]:
    height = batch.input_ids.shape[0]
    return torch.cat([batch.rows, batch.rows + height]), batch.columns.repeat(2)


def test_a_slot_has_room_for_what_any_of_its_trials_adapts(models: tiny.Models) -> None:
    base = models.base("llama")
    narrow = [adapter(base, seed=0, lora_r=4, target_modules=(name,)) for name in ("q_proj", "down_proj")]
    with packed(base, narrow, slots=(0, 1)) as pack:
        sizes = [sum(part.numel() for parts in one.weights.values() for part in parts) for one in narrow]
        assert pack.slot_weights == sum(sizes)
