"""What stands in for torch's `varlen_attn` where there is no GPU: the same signature, computed sequence by
sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tuner.adapters import varlen


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """[tokens, heads, width] each -> [tokens, heads, width]"""
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    starts = cu_seq_q.tolist()
    assert starts[0] == 0
    assert starts[-1] == query.shape[0] == key.shape[0] == value.shape[0]
    outputs = []
    for start, end in pairwise(starts):
        assert 0 < end - start <= max_q == max_k
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        before = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (before >= 0) & (before <= (left if left >= 0 else end))
        output = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def on_a_cpu(kernel: object = reference) -> Iterator[None]:
    """Within the block `attention: varlen` is possible on a CPU and in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel)
        patch.setattr(varlen, "_DEVICE_TYPE", "cpu")
        patch.setattr(varlen, "_DTYPES", (torch.bfloat16, torch.float32))
        yield
