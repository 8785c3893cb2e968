"""`attention: varlen` trains as torch does; what it cannot compute is refused when a base model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, Llama4TextConfig, LlamaConfig, MistralConfig

from tests import tiny
from tests.adapters.test_joined import _sizes
from tests.training.driving import Entry, drive, loss_difference, solo, update_difference, worker_state
from tests.varlen import on_a_cpu, reference
from tuner.adapters import Base, varlen
from tuner.adapters.base import load_base
from tuner.errors import ModelError

KINDS = ("llama", "qwen2", "mistral")
"""With four heads and two of keys and values each; the last has a window of 5."""


@pytest.fixture(scope="module")
def paths(models: tiny.Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    window = MistralConfig(**_sizes(LlamaConfig), sliding_window=5)
    mistral = tiny.save_model(tmp_path_factory.mktemp("mistral"), window)
    return {"llama": models.path("llama"), "qwen2": models.path("qwen2"), "mistral": mistral}


def loaded(path: Path, *, attention: Any = "varlen", max_length: int = tiny.MAX_LENGTH) -> Base:
    return load_base(tiny.model_spec(path), device="cpu", max_length=max_length, attention=attention)


def changed(change: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the stand-in, whose arguments `change` sees and may replace."""

    @wraps(reference)
    def call(*given: Any, **more: Any) -> Tensor:
        return reference(*given, **more | (change(*given, **more) or {}))

    return call


@pytest.fixture
def starts() -> Iterator[list[Tensor]]:
    """What marks the sequences of each call of the stand-in, which is in use."""
    calls: list[Tensor] = []
    with on_a_cpu(changed(lambda *given, **_: calls.append(given[3]))):
        yield calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_alone_and_packed_is_torchs(paths: dict[str, Path], starts: list[Tensor], kind: str) -> None:
    """With dropout, other ranks and batch sizes beside it, a hole in the slots, and a batch in several parts.

    Measured: losses 5e-8, updates 3e-6.
    """
    torchs, varlens = (loaded(paths[kind], attention=attention) for attention in ("torch", "varlen"))
    trials = [
        tiny.hyperparameters(training_seed=n, lora_r=4 + n, lora_dropout=0.1 * n, batch_size=4 + 3 * n)
        for n in range(3)
    ]
    entries = [Entry(0, 0), Entry(1, 1), Entry(2, 3)]
    packed = []
    for base in (torchs, varlens):
        starts.clear()
        with worker_state(base, trials, slots=4, micro_tokens=60) as state:
            assert state.joins_rows
            packed.append(drive(state, trials, entries, max_train_steps=5))
    of_passes = {id(each) for each in starts}
    assert len(starts) == 2 * len(of_passes), "one call for each of two layers a pass"
    assert len(of_passes) > 5
    assert max(len(each) for each in starts) > 9
    pairs = [(packed[1][n], packed[0][n]) for n in range(3)]
    pairs.append(tuple(solo(base, trials[1], max_train_steps=5) for base in (varlens, torchs)))  # type: ignore[arg-type]
    assert max(loss_difference(*pair) for pair in pairs) < 1e-4
    assert max(update_difference(*pair) for pair in pairs) < 1e-4


def test_layers_that_are_recomputed(paths: dict[str, Path], starts: list[Tensor]) -> None:
    trial = tiny.hyperparameters(lora_dropout=0.1)
    found = []
    for again in (False, True):
        base = loaded(paths["mistral"])
        assert not again or base.keep_fewer_activations()
        found.append(solo(base, trial, max_train_steps=2))
    assert loss_difference(*found) < 1e-5


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_bfloat16(models: tiny.Models, starts: list[Tensor], quantization: str) -> None:
    """Rounding is not taken for another attention; what makes queries does not matter."""
    path = models.path("llama", **tiny.WIDE)
    spec = tiny.model_spec(path, dtype="bfloat16", attention="varlen", quantization=quantization)
    base = load_base(spec, device="cpu", max_length=tiny.MAX_LENGTH, attention=spec.attention)
    assert (base.attention, base.joins_rows) == ("varlen", True)


def test_one_slot_joins_rows_of_similar_length(paths: dict[str, Path], starts: list[Tensor]) -> None:
    rows = tiny.examples(12, shortest=20, longest=24)
    trial = tiny.hyperparameters()
    for attention in ("torch", "varlen"):
        with worker_state(loaded(paths["llama"], attention=attention), [trial], rows=rows) as state:
            assert state.joins_rows is (attention == "varlen")


# --- what is refused ------------------------------------------------------------------------------


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as refused:
        loaded(path, **more)
    said = str(refused.value)
    assert said.startswith("model.attention: varlen cannot be used here: ")
    assert said.endswith(". Set model.attention: torch")
    return said


def test_a_machine_without_a_gpu(paths: dict[str, Path]) -> None:
    assert "it needs a CUDA GPU, and torch finds none" in refusal(paths["llama"])


def test_a_torch_without_it(paths: dict[str, Path]) -> None:
    def first(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> None: ...

    for kernel in (None, first):
        with on_a_cpu(kernel):
            assert "has no varlen_attn with windows; install torch 2.13" in refusal(paths["llama"])


def test_float32(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_DEVICE_TYPE", "cpu")
    assert "LlamaAttention: varlen_attn does not compute in torch.float32" in refusal(paths["llama"])


@pytest.mark.parametrize(
    ("size", "said"),
    [(12, "the head size is 12; varlen_attn takes multiples of 8"), (264, "the head size is 264;")],
)
def test_head_sizes(models: tiny.Models, size: int, said: str) -> None:
    with on_a_cpu():
        assert said in refusal(models.path("llama", head_dim=size))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (tiny.config("gemma2"), "rows of Gemma2ForCausalLM are padded, since its attention is eager"),
        (FalconConfig(**_sizes(FalconConfig)), "rows of FalconForCausalLM are padded, since examples in one"),
    ],
    ids=["gemma2", "falcon"],
)
def test_models_whose_rows_are_padded(tmp_path: Path, config: Any, said: str) -> None:
    with on_a_cpu():
        assert said in refusal(tiny.save_model(tmp_path, config))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"softcap": 50.0}, "varlen_attn has no softcap"),
        ({"s_aux": torch.zeros(4)}, "varlen_attn has no s_aux"),
        ({"dropout": 0.1}, "varlen_attn has no dropout"),
        ({"is_causal": False}, "it attends to later tokens"),
    ],
)
def test_what_a_layer_may_ask_for(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], said: str
) -> None:
    """A model's own code may; those of transformers that do are not joined."""
    asked = varlen._attention
    monkeypatch.setitem(
        varlen.AttentionInterface._global_mapping,
        varlen.NAMES["varlen"],
        lambda *given, **known: asked(*given, **known | more),
    )
    with on_a_cpu():
        assert f"LlamaAttention: {said}" in refusal(paths["llama"])


def test_chunks_of_tokens(tmp_path: Path) -> None:
    """Llama 4's masks have them, and its layers do not ask for them: it matters for longer examples only."""
    sizes = _sizes(LlamaConfig) | {"attention_chunk_size": 20, "num_local_experts": 1, "head_dim": 8}
    path = tiny.save_model(tmp_path, Llama4TextConfig(**sizes))
    with on_a_cpu():
        assert loaded(path, max_length=20).attention == "varlen"
        assert "its mask is neither causal nor the window that it asks for" in refusal(path)


def test_biases_of_scores(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    masks = varlen.AttentionMaskInterface._global_mapping
    own = masks[varlen.NAMES["varlen"]]
    monkeypatch.setitem(masks, varlen.NAMES["varlen"], lambda *given, **more: own(*given, **more).float())
    with on_a_cpu():
        assert "it adds something to the scores" in refusal(paths["llama"])


class Doubled(torch.autograd.Function):
    """Gradients that are wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        return 2 * outputs[0]


def _wrong_gradients(*given: Any, **more: Any) -> Tensor:
    query, *others = given
    return reference(Doubled.apply(query), *others, **more)  # type: ignore[no-untyped-call]


def _raising(error: Exception) -> Callable[..., Tensor]:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return changed(call)


_CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
_OLDER_GPU = "FlashAttention only supports Ampere GPUs or newer.\nException raised from mha_fwd"


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (changed(lambda *_, **__: {"scale": 1.0}), "Attention: values differ from torch's by"),
        (changed(lambda *_, **__: {"window_size": (5, 0)}), "Attention: values differ from torch's by"),
        (changed(lambda *_, **__: {"window_size": (-1, 0)}), "Attention: values differ from torch's by"),
        (wraps(reference)(_wrong_gradients), "Attention: gradients of queries differ from torch's by"),
        (
            _raising(RuntimeError(_OLDER_GPU)),
            "varlen_attn says: FlashAttention only supports Ampere GPUs or newer.",
        ),
        (_raising(TypeError("no such argument")), "varlen_attn says: no such argument"),
        (_raising(AssertionError()), "varlen_attn says: AssertionError"),
    ],
    ids=["scale", "wider window", "no window", "gradients", "older GPU", "another version", "no words"],
)
def test_a_kernel_that_computes_something_else(
    paths: dict[str, Path], kernel: Callable[..., Tensor], said: str
) -> None:
    with on_a_cpu(kernel):
        assert said in refusal(paths["mistral"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(_CUBLAS)])
def test_too_little_memory_is_no_fault_of_attention(paths: dict[str, Path], error: RuntimeError) -> None:
    with on_a_cpu(_raising(error)), pytest.raises(ModelError, match="does not fit into the memory of cpu"):
        loaded(paths["llama"])


def test_a_kernel_whose_examples_meet(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the comparison of a layer misses it."""

    @wraps(reference)
    def leaks(*given: Any, **more: Any) -> Tensor:
        return reference(*given, **more) + 1e-6 * given[2].mean()

    monkeypatch.setattr(varlen, "_difference", lambda *_, **__: None)
    with on_a_cpu(leaks):
        assert "examples of LlamaForCausalLM in one row meet" in refusal(paths["llama"])


def test_nothing_is_compared_once_it_is_loaded(
    paths: dict[str, Path], starts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded(paths["llama"])
    assert not varlen._compared
    monkeypatch.setattr(varlen, "_difference", None)
    solo(base, tiny.hyperparameters(), max_train_steps=1)
