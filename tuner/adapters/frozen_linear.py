"""Arithmetic beside frozen weights: linear layers, the loss of the output head, and dropout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_log = logging.getLogger(__name__)

MIN_OPERATIONS = 1 << 26
"""Smallest product for oneDNN. It compiles a kernel for each new shape, which takes 0.5 to 0.8 ms: a product
of this size gains them back when the shape comes again (docs/log.md)."""


_onednn_linear: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""Private to torch; None in a torch without it, which then multiplies as it does elsewhere."""


class FrozenLinear(nn.Linear):
    """An `nn.Linear` whose weights get no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(outputs[0], weight.t()), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + bias without a gradient of W: [..., in], [out, in], [out] -> [..., out]."""
    if _is_exact(x) and _is_exact(weight) and onednn_is_faster() and _operations(x, weight) >= MIN_OPERATIONS:
        assert _onednn_linear is not None
        return _onednn_linear(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def speed_up(model: nn.Module) -> None:
    """Turn the model's linear layers into `FrozenLinear` where that is faster."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _is_exact(module.weight):
            module.__class__ = FrozenLinear  # the same layer with the same hooks and names


@cache
def onednn_is_faster() -> bool:
    """Return whether MKL would leave half of this processor idle. Decided by the processor's type, not by
    timing: the library decides the last digits, and a resumed trial must reproduce them.
    """
    return (
        _onednn_linear is not None
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _vendor()
    )


def _vendor() -> str:
    """Return the vendor of the first core as Linux reports it; empty elsewhere."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line for line in lines if line.startswith("vendor_id")), "")


def _operations(x: Tensor, weight: Tensor) -> int:
    return 2 * x.numel() * weight.shape[0]


def _is_exact(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32. A GPU, whose products need more rows to be busy, holds more."""
_GPU_BYTES_AN_ELEMENT = 256
"""Memory for each of them: a 64th of the GPU is logits in float32."""
_MAX_GPU_ELEMENTS = 1 << 27


def chunk_rows(vocabulary_size: int, device: torch.device) -> int:
    """Return the rows of logits that are computed at once: at least one."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(1, chunk_elements(total) // vocabulary_size)


def chunk_elements(gpu_bytes: int) -> int:
    """Return the logits held at once beside a GPU's memory; 0 for another device."""
    return max(CHUNK_ELEMENTS, min(_MAX_GPU_ELEMENTS, gpu_bytes // _GPU_BYTES_AN_ELEMENT))


FusedNll: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [tokens, vocabulary] in float32 and targets [tokens] -> the targets' negative log-likelihoods, and
their gradients with respect to the logits, which may be overwritten."""


class _HeadNll(torch.autograd.Function):
    """The head is frozen, so the only gradient is that of the hidden states, computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, fused: FusedNll | None
    ) -> Tensor:
        rows = chunk_rows(weight.shape[0], hidden.device)
        needs_gradient = hidden.requires_grad
        nll, gradients = [], []
        for start in range(0, hidden.shape[0], rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            if fused is not None and needs_gradient:
                found, gradient = fused(product(part, weight, bias).float(), wanted[:, 0])
                nll.append(found)
                gradients.append(product(gradient.to(weight.dtype), weight.t()))
                continue
            log_probability = product(part, weight, bias).float().log_softmax(dim=1)
            nll.append(-log_probability.gather(1, wanted)[:, 0])
            if needs_gradient:
                probability = log_probability.exp_()
                probability.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=probability.dtype))
                gradients.append(product(probability.to(weight.dtype), weight.t()))
        ctx.save_for_backward(torch.cat(gradients) if gradients else hidden.new_empty(0))
        return torch.cat(nll) if nll else hidden.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0].to(gradient.dtype)[:, None], None, None, None, None)


def head_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    fused: FusedNll | None = None,
) -> Tensor:
    """Return the negative log-likelihood [tokens] in float32 of `targets` [tokens] given `hidden` [tokens,
    width].

    `weight` is [vocabulary, width] and gets no gradient. `fused` computes where a gradient is needed.
    """
    return _HeadNll.apply(hidden, weight, bias, targets, fused)  # type: ignore[no-any-return, no-untyped-call]


def chunked_nll(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocabulary_size: int
) -> Tensor:
    """Return the same for a head of any kind: `logits` maps [tokens, width] to [tokens, vocabulary].

    It runs again in the backward pass, chunk by chunk.
    """
    rows = chunk_rows(vocabulary_size, hidden.device)

    def nll(part: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(part).float(), wanted, reduction="none")

    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat(
        [checkpoint(nll, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


@torch.no_grad()
def token_scores(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocabulary_size: int
) -> tuple[Tensor, Tensor]:
    """Return the same without gradients, and whether no token is likelier than the target; each [tokens]."""
    rows = chunk_rows(vocabulary_size, hidden.device)
    nll, is_first = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
    for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        log_probability = logits(part).float().log_softmax(dim=1)
        chosen = log_probability.gather(1, wanted[:, None])[:, 0]
        nll.append(-chosen)
        is_first.append(chosen >= log_probability.amax(dim=1))
    return torch.cat(nll), torch.cat(is_first)


_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B - 2**32
"""Multipliers of the `lowbias32` hash (C. Wellons, "Prospecting for Hash Functions", 2018; public domain)."""
_SIGN = -(2**31)
"""Turns unsigned 32-bit order into signed order."""


def row_keys(seed: int | Tensor, step: int | Tensor, rows: Tensor) -> Tensor:
    """Return a 32-bit key per row [rows], from the trial's seed, the step and the row's batch position.

    `seed` and `step` may be int64 tensors [rows].
    """
    key = _hash(torch.as_tensor(seed, dtype=torch.int64).to(torch.int32))
    key = _hash(key ^ torch.as_tensor(step, dtype=torch.int64).to(torch.int32))
    return _hash(key.to(rows.device) ^ rows.to(torch.int32))


def module_keys(keys: Iterable[int], *, device: torch.device) -> Tensor:
    """Return the hashes of unsigned 32-bit keys of modules: int32 [modules]."""
    return _hash(torch.tensor(list(keys), dtype=torch.int64).to(torch.int32).to(device))


def token_keys(
    rows: Tensor, modules: Tensor, *, length: int, joined: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return a key per module and token [modules, rows, length], from `row_keys` and `module_keys`.

    For `joined` rows [modules, tokens]: `rows` has a key per example, and the pair is each token's example
    and its position there.
    """
    per_row = _hash(rows.to(torch.int32)[None, :] ^ modules[:, None])
    if joined is not None:
        examples, positions = joined
        return _hash(per_row.index_select(1, examples) ^ positions.reshape(-1).to(torch.int32))
    return _hash(per_row[:, :, None] ^ torch.arange(length, dtype=torch.int32, device=rows.device))


def dropout_threshold(rate: float) -> int:
    """Return the signed 32-bit number that a share of `rate` of all draws lies below."""
    return min(round(rate * 2**32), 2**32 - 1) + _SIGN


def dropout(x: Tensor, keys: Tensor, thresholds: Tensor, kept_shares: Tensor) -> Tensor:
    """Return x / (1 - rate), and zero where the draw for a token and channel is below the threshold.

    For many slots at once, each with a rate of its own: `x` is [..., width] with the tokens of one slot after
    the other, `keys` [slots, tokens] are from `token_keys`, `thresholds` from `dropout_threshold` and
    `kept_shares`, which are 1 - rate, are [slots, 1, 1].
    """
    fused = fused_dropout(x.dtype) if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16) else None
    if fused is not None and x.numel() < 2**30:
        return _Fused.apply(x, keys, thresholds, kept_shares, fused)  # type: ignore[no-any-return, no-untyped-call]
    return _Dropout.apply(x, keys, thresholds, kept_shares)  # type: ignore[no-any-return, no-untyped-call]


@cache
def fused_dropout(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Return `dropout_kernel.dropped`; None where Triton is not installed or cannot compile it."""
    try:
        from tuner.adapters.dropout_kernel import dropped
    except ImportError:
        return None
    return dropped if runs(dropped, dtype, torch.device("cuda")) else None


def runs(fused: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a kernel runs, and log why not: Triton compiles with the machine's C compiler."""
    try:
        x = torch.zeros(1, 1, 1, dtype=dtype, device=device)
        none = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
        fused(x, none[0], none, torch.ones(1, 1, 1, device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever Triton and a compiler raise: the plain dropout has the same bits
        _log.warning("dropout without its kernel, which is slower: %s", error)
        return False
    return True


class _Fused(torch.autograd.Function):
    """Draws again in the backward pass instead of keeping what was dropped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, thresholds: Tensor, shares: Tensor, fused: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(keys, thresholds, shares)
        ctx.fused = fused
        return fused(x, keys, thresholds, shares)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.fused(outputs[0], *ctx.saved_tensors), None, None, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, thresholds: Tensor, kept_shares: Tensor) -> Tensor:
        channels = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        draws = _hash(keys[:, :, None] ^ channels).bitwise_xor_(_SIGN)
        is_kept = draws >= thresholds
        ctx.save_for_backward(is_kept, kept_shares)
        return _keep(x, is_kept, kept_shares)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _keep(outputs[0], *ctx.saved_tensors), None, None, None


def _keep(x: Tensor, is_kept: Tensor, kept_shares: Tensor) -> Tensor:
    """Divide what is kept, and clear the bits of the rest.

    The division is in float32 and rounded, as one by a number is: bfloat16 would differ from it. On a CPU,
    `torch.where` takes ten times as long as the bits, since its branch depends on chance.
    """
    kept = (x.reshape(is_kept.shape) / kept_shares).to(x.dtype)
    bits = _BITS[x.element_size()]
    kept.view(bits).bitwise_and_(is_kept.to(bits).neg_())
    return kept.view(x.shape)


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _hash(value: Tensor) -> Tensor:
    """Mix 32 bits in place. Products wrap; what a shift of a negative number fills in is masked."""
    shifted = (value >> 16).bitwise_and_(0xFFFF)
    value.bitwise_xor_(shifted).mul_(_MIX_1)
    shifted = torch.bitwise_right_shift(value, 15, out=shifted).bitwise_and_(0x1FFFF)
    value.bitwise_xor_(shifted).mul_(_MIX_2)
    shifted = torch.bitwise_right_shift(value, 16, out=shifted).bitwise_and_(0xFFFF)
    return value.bitwise_xor_(shifted)
