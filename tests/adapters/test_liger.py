"""liger's kernels stay in the model that got them, and are refused where they lack something or err.

A stand-in has the names and signatures of liger-kernel 0.8.5, and computes by torch. What the kernels
themselves compute is tests/gpu's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from tests import tiny
from tuner.adapters.base import freeze, load_base
from tuner.adapters.frozen_linear import head_nll
from tuner.adapters.initial import meta_copy
from tuner.adapters.liger import nll_and_gradient, refuse_without_liger, require_liger, use_liger
from tuner.errors import ModelError
from tuner.installation import install_command
from tuner.training.environment import environment


@pytest.mark.parametrize(
    ("is_installed", "has_gpu", "words"),
    [
        (
            False,
            False,
            f"liger-kernel is not installed; {install_command('liger')}, or set model.kernels: torch",
        ),
        (False, True, "not installed"),
        (
            True,
            False,
            "needs a CUDA GPU, and torch finds none; see tuner doctor, or set model.kernels: torch",
        ),
    ],
)
def test_what_is_lacking(is_installed: bool, has_gpu: bool, words: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.kernels: liger cannot be used here: ") as refused:
        refuse_without_liger(is_installed=is_installed, has_gpu=has_gpu)
    assert words in str(refused.value)
    assert refused.value.exit_code == 2
    refuse_without_liger(is_installed=True, has_gpu=True)


OVERWRITING = """
class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(2)


computed = Overwriting.apply


class LigerRMSNorm"""
APPLY = """
import torch
from transformers.models.llama import modeling_llama

from liger_kernel import called

_own = modeling_llama.apply_rotary_pos_emb


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    called.append("rope")
    return _own(q, k, cos, sin, unsqueeze_dim)


def computed(value):
    return value


class LigerRMSNorm(torch.nn.Module):
    def forward(self, hidden_states):
        called.append("norm")
        return computed(type(self).forward(self, hidden_states))


def apply_liger_kernel_to_llama(
    rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None
):
    assert not cross_entropy and not fused_linear_cross_entropy
    modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
    modeling_llama.LlamaRMSNorm = LigerRMSNorm
    for layer in model.model.layers:
        norm = layer.input_layernorm
        norm.__dict__["forward"] = LigerRMSNorm.forward.__get__(norm, type(norm))


MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_liger_kernel_to_llama}


def _apply_liger_kernel_to_instance(model, **kwargs):
    taken = {name: value for name, value in kwargs.items() if name != "geglu"}
    MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, **taken)
"""
LOSSES = """
import torch

MAX_FUSED_SIZE = 65536 // 2


class _Kernel:
    def __getitem__(self, grid):
        return self

    def __call__(
        self, X_ptr, X_stride, Y_ptr, Y_stride, weight_ptr, loss_ptr, z_loss_ptr, loss_stride,
        token_accuracy_ptr, token_accuracy_stride, predicted_tokens_ptr, predicted_tokens_stride, n_cols,
        n_non_ignore, sum_non_ignore_weight, weight_sum, ignore_index, lse_square_scale, label_smoothing,
        reduction, softcap, RETURN_Z_LOSS, RETURN_TOKEN_ACCURACY, RETURN_PREDICTED_TOKENS, BLOCK_SIZE,
        HAS_WEIGHT, HAS_SOFTCAPPING, HAS_GRADIENTS, num_warps,
    ):
        assert BLOCK_SIZE >= n_cols
        loss_ptr.copy_(torch.nn.functional.cross_entropy(X_ptr, Y_ptr, reduction=reduction))
        X_ptr.copy_(X_ptr.softmax(1) - torch.nn.functional.one_hot(Y_ptr, n_cols))


liger_cross_entropy_kernel = _Kernel()
"""


Install = Callable[..., list[str]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put the stand-in on the path, with changes of its text; return what will have been called."""

    def installed(changes: Mapping[str, str] | None = None) -> list[str]:
        files = {
            "__init__.py": "called = []\n",
            "transformers/__init__.py": "from .monkey_patch import _apply_liger_kernel_to_instance\n",
            "transformers/monkey_patch.py": APPLY,
            "ops/__init__.py": "",
            "ops/cross_entropy.py": LOSSES,
        }
        for name, text in files.items():
            for before, after in (changes or {}).items():
                text = text.replace(before, after)
            path = tmp_path / "liger_kernel" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("liger_kernel").called  # type: ignore[no-any-return]

    there = {name for name in sys.modules if name.partition(".")[0] == "liger_kernel"}
    assert not there, "another test has loaded the package"
    yield installed
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


def frozen(models: tiny.Models, shape: tiny.Shape = "llama") -> PreTrainedModel:
    return models.plain(shape).requires_grad_(False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(12)[None], use_cache=False).logits  # type: ignore[no-any-return]


def test_one_model_gets_them(models: tiny.Models, install: Install) -> None:
    called = install()
    model, other, own = frozen(models), frozen(models), dict(vars(modeling_llama))
    use_liger(model)
    assert {name for name, value in vars(modeling_llama).items() if value is not own.get(name)} == set()
    called.clear()
    expected = logits(other)
    assert called == []
    assert torch.equal(logits(model), expected)
    assert sorted(called) == ["norm"] * 2 + ["rope"] * 2, "two layers"

    # What a worker does with its model: self-tests, a copy of its shapes, and recomputed layers.
    base = freeze(model, dtype=torch.float32)
    assert base.joins_rows
    called.clear()
    ids, rows, columns = torch.arange(12)[None], torch.tensor([0, 0]), torch.tensor([3, 9])
    plain = freeze(other, dtype=torch.float32)
    assert base.keep_fewer_activations()
    first = base.model.get_input_embeddings().weight.requires_grad_()
    nll = base.token_nll(ids, rows, columns)
    assert torch.equal(nll, plain.token_nll(ids, rows, columns))
    assert torch.autograd.grad(nll.sum(), first)[0].any()
    assert called.count("rope") == 4, "each layer twice"
    meta = meta_copy(base, base_path="")
    assert type(meta.model.norm) is own["LlamaRMSNorm"]


def test_an_unknown_architecture_is_refused(models: tiny.Models, install: Install) -> None:
    install()
    with pytest.raises(
        ModelError, match=r"liger-kernel does not know the architecture gemma2; use another base"
    ):
        use_liger(frozen(models, "gemma2"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_own(q, k, cos, sin, unsqueeze_dim)": "(q, k)"}, "its logits of LlamaForCausalLM differ from"),
        ({"class LigerRMSNorm": OVERWRITING}, "its gradients of"),
        ({"X_ptr.softmax(1) -": "X_ptr.softmax(1) +"}, "its gradients of losses of"),
        ({"reduction=reduction": "reduction='mean'"}, "its losses of"),
        (
            {"    modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb\n": "",
             "for layer in model.model.layers": "for layer in ()"},
            "found nothing to compute in LlamaForCausalLM",
        ),
    ],
    ids=["values", "gradients", "loss gradients", "losses", "nothing"],
)  # fmt: skip
def test_what_computes_something_else_is_refused(
    models: tiny.Models, install: Install, changes: Mapping[str, str], words: str
) -> None:
    install(changes)
    with pytest.raises(ModelError, match=words) as refused:
        use_liger(frozen(models))
    assert "or set model.kernels: torch" in str(refused.value)


def test_losses_by_a_kernel(install: Install) -> None:
    """Each example's loss has a weight of its own in the backward pass; none is needed without gradients."""
    install()
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    targets, weights = torch.randint(40, (5,)), torch.rand(5)
    found = []
    for fused in (None, nll_and_gradient):
        first = hidden.clone().requires_grad_()
        nll = head_nll(first, weight, None, targets, fused=fused)
        found.append((nll.detach(), *torch.autograd.grad((nll * weights).sum(), first)))
        assert torch.equal(head_nll(hidden, weight, None, targets, fused=fused), found[0][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_worker_without_a_gpu_says_so(models: tiny.Models, install: Install) -> None:
    install()
    with pytest.raises(ModelError, match="needs a CUDA GPU"):
        require_liger()
    spec = tiny.model_spec(models.path("llama"), kernels="liger")
    with pytest.raises(ModelError, match=r"model\.kernels: liger cannot be used here: it needs a CUDA GPU"):
        load_base(spec, device="cpu", max_length=tiny.MAX_LENGTH, kernels=spec.kernels)
    assert load_base(spec, device="cpu", max_length=tiny.MAX_LENGTH).fused_nll is None, "to answer prompts"


def test_the_record_names_their_version() -> None:
    plain = environment(torch.device("cpu"), slots=1)
    assert "liger-kernel" not in plain
    with_them = environment(torch.device("cpu"), slots=1, kernels="liger")
    assert with_them.keys() - plain.keys() == {"liger-kernel", "triton"}
