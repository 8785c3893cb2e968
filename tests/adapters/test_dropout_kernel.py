"""The Triton kernel has the bits of the plain dropout, shown by Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tuner.adapters
from tests.operators import operators_of
from tuner.adapters import frozen_linear
from tuner.adapters.frozen_linear import dropout, dropout_threshold, module_keys, row_keys, token_keys

pytest.importorskip("triton", reason="Triton is not installed: the kernel runs nowhere here")
Dropped = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
RATES = (0.0, 0.05, 0.5, 1.0 - 1e-7)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Dropped]:
    """The kernel, of a copy of the module that Triton interprets."""
    path = Path(tuner.adapters.__file__).with_name("dropout_kernel.py")
    spec = importlib.util.spec_from_file_location("interpreted_dropout_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
        yield module.dropped


def drawn(length: int, width: int, dtype: torch.dtype, *, device: str = "cpu") -> tuple[Tensor, ...]:
    """x for a slot of each rate, its keys, thresholds and kept shares."""
    slots = len(RATES)
    rows = row_keys(torch.arange(slots), 7, torch.arange(slots))
    (keys,) = token_keys(rows, module_keys([3], device=torch.device("cpu")), length=length)
    x = torch.randn(slots, length, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x[0, 0, 0], x[1, 0, :5] = float("inf"), float("nan")
    thresholds = torch.tensor([dropout_threshold(rate) for rate in RATES], dtype=torch.int32)
    shares = torch.tensor([1 - rate for rate in RATES])
    parts = x.to(dtype), keys, thresholds.view(-1, 1, 1), shares.view(-1, 1, 1)
    return tuple(part.to(device) for part in parts)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Any NaN is as good as another."""
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    numbers = [part.nan_to_num(nan=-1.25, posinf=float("inf"), neginf=float("-inf")) for part in (one, other)]
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(*(part.view(bits) for part in numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "width"), [(1, 1), (3, 65), (17, 384)])
def test_bits(interpreted: Dropped, dtype: torch.dtype, length: int, width: int) -> None:
    x, *drop = drawn(length, width, dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for apply in (dropout, lambda *a: frozen_linear._Fused.apply(*a, interpreted)):
        leaf = x.clone().requires_grad_()
        y = apply(leaf, *drop)
        y.backward(upstream)
        assert leaf.grad is not None
        found.append((y.detach(), leaf.grad))
    for plain, fused in zip(*found, strict=True):
        assert same_bits(plain, fused)
    assert width < 300 or 0 < int((found[0][0][1] == 0).sum()) < x[1].numel()


def test_nothing_but_the_result_is_made(interpreted: Dropped) -> None:
    """What the interpreter itself copies does not count."""
    counted = operators_of(lambda: interpreted(*drawn(3, 64, torch.float32)))
    made = operators_of(lambda: drawn(3, 64, torch.float32))
    assert counted.calls["empty_like"] - made.calls["empty_like"] == 1
    for name in ("bitwise_xor_", "mul_", "ge", "div", "bitwise_and_", "where"):
        assert counted.calls[name] == made.calls[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: torch.cuda.is_available() is False")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    fused = frozen_linear.fused_dropout(dtype)
    assert fused is not None
    there = drawn(33, 384, dtype, device="cuda")
    plain: Tensor = frozen_linear._Dropout.apply(*there)
    assert same_bits(fused(*there), plain)
