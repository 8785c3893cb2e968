"""torch's `varlen_attn` over joined rows: one call a layer for all examples, which stay where they are.

Transformers' masks do not reach it, and its limits show only when it is called. So while a base model is
loaded, what each layer asks for is checked, and a few values and gradients are compared with torch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as by_sdpa
from transformers.masking_utils import sdpa_mask

from tuner.adapters.device_io import one_out_of_memory
from tuner.adapters.joined import NAMES, Joined, current
from tuner.adapters.placement import on
from tuner.errors import ModelError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None  # type: ignore[assignment]

_DEVICE_TYPE, _DTYPES = "cuda", (torch.bfloat16,)
_MAX_HEAD_SIZE, _HEAD_SIZE_MULTIPLE = 256, 8
"""What it is made for; the kernel's own errors tell what else it cannot do."""
_NEEDED = {"scale", "window_size", "enable_gqa"}
"""Parameters that its first versions lacked."""


def require_varlen(device: torch.device) -> None:
    """Raise ModelError if `varlen_attn` cannot be used on this device. Cheap: loads nothing."""
    if varlen_attn is None or not inspect.signature(varlen_attn).parameters.keys() >= _NEEDED:
        raise refused(f"torch {torch.__version__} has no varlen_attn with windows; install torch 2.13")
    if device.type != _DEVICE_TYPE:
        raise refused("it needs a CUDA GPU, and torch finds none; see tuner doctor")


def refused(why: str) -> ModelError:
    """Return the error for what cannot be computed."""
    return ModelError(f"model.attention: varlen cannot be used here: {why}. Set model.attention: torch")


_compared: list[int] = []
"""The most tokens of an example, while a base model is loaded."""


@contextmanager
def compared(max_length: int) -> Iterator[None]:
    """Within the block each layer's attention is checked. It raises ModelError for what is not torch's."""
    _compared.append(max_length)
    try:
        yield
    finally:
        _compared.pop()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers' for `sdpa`, of each example in joined rows."""
    given = (query, key, value)
    if _compared:
        why = _unknown(module, more) or _too_much(given) or _other_mask(attention_mask, sliding_window)
        why = why or _difference(module, given, scaling=scaling, window=sliding_window)
        if why is not None:
            raise refused(f"{type(module).__name__}: {why}")
    return _by_varlen(*given, joined=current(), scaling=scaling, window=sliding_window), None


def _by_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, joined: Joined, scaling: float | None, window: int | None
) -> Tensor:
    """[slots, heads, length, width] each -> [slots, length, heads, width]"""
    slots = query.shape[0]
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    starts = on(joined.starts, query.device)
    output = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        joined.longest,
        joined.longest,
        scale=scaling,
        # transformers' windows count the token itself, too.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=num_heads != num_kv_heads,
    )
    assert isinstance(output, Tensor)
    return output.view(slots, -1, *output.shape[1:])


def _mask(batch_size: int, q_length: int, kv_length: int, **more: Any) -> Tensor | None:
    """Make no mask; while a base model is loaded, what the last token of the longest example may see."""
    if not _compared:
        return None
    length = _compared[-1]
    made: Tensor | None = sdpa_mask(
        1, 1, length, **more | {"q_offset": length - 1, "allow_is_causal_skip": False}
    )
    return made


AttentionInterface.register(NAMES["varlen"], _attention)
AttentionMaskInterface.register(NAMES["varlen"], _mask)


_NOT_FOR_ATTENTION = {"position_ids", "use_cache"}
"""Layers hand them on to every attention."""


def _unknown(module: nn.Module, more: dict[str, Any]) -> str | None:
    """Return what a layer asks for that `varlen_attn` has not, such as softcap or sinks (s_aux)."""
    if more.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "it attends to later tokens"
    asked = {name for name, value in more.items() if isinstance(value, Tensor) or value}
    found = sorted(asked - _NOT_FOR_ATTENTION - {"is_causal"})
    return f"varlen_attn has no {', '.join(found)}" if found else None


def _too_much(given: Sequence[Tensor]) -> str | None:
    """Return which limit of the kernel these queries, keys and values exceed."""
    query, _, value = given
    if query.dtype not in _DTYPES:
        return f"varlen_attn does not compute in {query.dtype}"
    size = query.shape[-1]
    if size != value.shape[-1]:
        return f"values have another head size ({value.shape[-1]}) than queries ({size})"
    if size > _MAX_HEAD_SIZE or size % _HEAD_SIZE_MULTIPLE:
        return f"the head size is {size}; varlen_attn takes multiples of 8 up to {_MAX_HEAD_SIZE}"
    return None


def _other_mask(mask: Tensor | None, window: int | None) -> str | None:
    """Return whether the model's mask lets the last token see something else than its window."""
    length = _compared[-1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape[-2:] != (1, length)):
        return "it adds something to the scores, or changes the mask"
    seen = torch.arange(length - 1, -1, -1) < (length if window is None else window)
    same = bool(seen.all()) if mask is None else bool((mask.cpu() == seen).all())
    return None if same else "its mask is neither causal nor the window that it asks for"


_SHOWN_WINDOW = 5
"""Tokens of a window, where a layer has one: the examples of a comparison are longer."""


def _difference(
    module: nn.Module, given: Sequence[Tensor], *, scaling: float | None, window: int | None
) -> str | None:
    """Return how values or gradients for made-up inputs of these shapes differ from torch's."""
    joined, draw = current(), torch.Generator().manual_seed(0)
    window = None if window is None else min(window, _SHOWN_WINDOW)
    made = [torch.randn(part.shape, generator=draw).to(part) for part in given]
    place = torch.arange(made[0].shape[2], device=made[0].device)
    numbers, before = on(joined.examples, place.device), place[:, None] - place
    mask = (numbers[:, None] == numbers) & (before >= 0) & (before < (window or len(place)))

    def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output: Tensor = by_sdpa(module, query, key, value, mask[None, None], scaling=scaling)[0]
        return output

    varlens = partial(_by_varlen, joined=joined, scaling=scaling, window=window)
    try:
        with one_out_of_memory():
            expected, computed = (_results(attend, made) for attend in (torchs, varlens))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  # the kernel may raise whatever it likes
        return f"varlen_attn says: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    allowed = torch.finfo(made[0].dtype).eps ** 0.5
    for what, one, other in zip(_COMPARED, expected, computed, strict=True):
        difference = float((one - other).norm() / one.norm())
        if not difference <= allowed:
            return f"{what} differ from torch's by {difference:.2%}, more than rounding explains"
    return None


_COMPARED = ("values", "gradients of queries", "gradients of keys", "gradients of values")


def _results(attend: Callable[..., Tensor], made: Sequence[Tensor]) -> list[Tensor]:
    """Return what attention gives for these inputs, and a gradient for each of them, in float32."""
    leaves = [part.clone().requires_grad_() for part in made]
    with torch.enable_grad():
        output = attend(*leaves)
        gradients = torch.autograd.grad(output, leaves, made[0].transpose(1, 2))
    return [each.detach().float() for each in (output, *gradients)]
