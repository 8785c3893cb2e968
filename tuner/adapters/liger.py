"""Kernels of the optional package liger-kernel: a model's norms, RoPE and gated activations; cross-entropy.

Its own functions change transformers for the whole process, and would change the next model, too. Here a
model's modules get the kernels, and transformers is as it was.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tuner.errors import ModelError
from tuner.installation import lacks

_log = logging.getLogger(__name__)


def require_liger() -> None:
    """Raise ModelError if liger's kernels cannot be used here. Cheap: loads nothing."""
    refuse_without_liger(
        is_installed=find_spec("liger_kernel") is not None, has_gpu=torch.cuda.is_available()
    )


def refuse_without_liger(*, is_installed: bool, has_gpu: bool) -> None:
    """Raise ModelError for what is lacking."""
    why = lacks("liger-kernel", extra="liger", is_installed=is_installed, has_gpu=has_gpu)
    if why is not None:
        raise _refused(why)


def _refused(why: str) -> ModelError:
    return ModelError(f"model.kernels: liger cannot be used here: {why}, or set model.kernels: torch")


def use_liger(model: PreTrainedModel) -> None:
    """Compute norms, RoPE and gated activations of a frozen model with liger's kernels.

    Compares results for a few tokens with torch's. Raises ModelError if liger does not know the architecture,
    or computes something else.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise _refused(f"liger-kernel does not know the architecture {kind}; use another base model")
    if not type(model).__module__.startswith("transformers.models."):
        raise _refused("the model computes with Python code of its repository; use another base model")
    before = _few_results(model)
    changed = _patched(model)
    rotated = sum([_calls_own(module, changed) for module in model.modules()])
    patched = sum("forward" in vars(module) for module in model.modules()) - rotated
    _log.info("model.kernels: liger computes %d norms and activations, and RoPE %d times", patched, rotated)
    name = type(model).__name__
    if not rotated + patched:
        raise _refused(f"liger-kernel found nothing to compute in {name}; use another base model")
    logits, gradient = _few_results(model)
    targets = torch.arange(logits.shape[0], device=logits.device)
    expected, computed = _nll_and_gradient(logits, targets), nll_and_gradient(logits.clone(), targets)
    root = torch.finfo(model.dtype).eps ** 0.5
    for what, one, other, allowed in (
        ("logits", before[0], logits, root),
        # They have passed twice as many roundings. One that was overwritten too early is wrong by its size.
        ("gradients", before[1], gradient, 4 * root),
        ("losses", expected[0], computed[0], _EXACT),
        ("gradients of losses", expected[1], computed[1], _EXACT),
    ):
        difference = float((one - other).norm() / one.norm())
        if not difference <= allowed:
            raise _refused(
                f"its {what} of {name} differ from torch's by {difference:.2%}, more than rounding explains; "
                "use another version of liger-kernel"
            )


_EXACT = 1e-4
"""Of float32, in which losses are computed."""


def _nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute by torch what `nll_and_gradient` does."""
    with torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        nll = nn.functional.cross_entropy(leaf, targets, reduction="none")
        (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), gradient


def _few_results(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return the logits [tokens, vocabulary] of a few rows, and their loss's gradient at the first layer;
    both in float32.
    """
    embedding = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    ids = torch.arange(32, device=embedding.weight.device).view(2, 16) * 7 % vocabulary
    first: list[Tensor] = []

    def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        first.append(output.detach().requires_grad_())
        return first[0]

    hook = embedding.register_forward_hook(begin)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, first)
    finally:
        hook.remove()
    return logits.detach().flatten(0, 1), gradient.float()


def _patched(model: PreTrainedModel) -> Mapping[ModuleType, Mapping[str, Any]]:
    """Apply liger's patch to the model's modules; return what else it changed, which is changed back."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    own = {home: dict(vars(home)) for home in homes if home.__name__.startswith("transformers.models.")}
    try:
        _apply_liger_kernel_to_instance(
            model=model,
            rope=True,
            rms_norm=True,
            swiglu=True,
            geglu=True,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
    finally:
        changed = {
            home: {name: value for name, value in vars(home).items() if value is not names.get(name)}
            for home, names in own.items()
        }
        for home, names in own.items():
            vars(home).update(names)
    return changed


def _calls_own(module: nn.Module, changed: Mapping[ModuleType, Mapping[str, Any]]) -> bool:
    """Let a module call changed functions, such as `apply_rotary_pos_emb`; return whether it calls any.

    A function finds them among the globals of its file, so the module's `forward` gets globals of its own.
    """
    forward = inspect.unwrap(type(module).forward)
    of_file = changed.get(sys.modules[type(module).__module__], {})
    functions = {name: value for name, value in of_file.items() if inspect.isfunction(value)}
    if not functions.keys() & set(forward.__code__.co_names):
        return False
    if forward is not type(module).forward:
        _log.info("model.kernels: %s keeps torch's RoPE: it is decorated", type(module).__name__)
        return False
    called = FunctionType(
        forward.__code__,
        {**forward.__globals__, **functions},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    called.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(called, module)
    return True


def nll_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood [tokens] of `targets` [tokens], and its gradient with respect to
    `logits` [tokens, vocabulary], in float32. The gradient takes the memory of `logits`.

    This is liger's kernel without its wrapper, which waits for the GPU three times at each call.
    """
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    num_rows, vocabulary = logits.shape
    nll = logits.new_empty(num_rows)
    liger_cross_entropy_kernel[(num_rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=targets,
        Y_stride=targets.stride(0),
        weight_ptr=None,
        loss_ptr=nll,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocabulary,
        n_non_ignore=num_rows,
        sum_non_ignore_weight=num_rows,
        ignore_index=-100,
        weight_sum=0.0,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="none",
        softcap=None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (vocabulary - 1).bit_length()),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=True,
        num_warps=16 if torch.version.hip else 32,  # as its wrapper
    )
    return nll, logits
