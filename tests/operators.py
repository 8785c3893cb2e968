"""Counts the operators that reach a device, and the copies between it and the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCounter(TorchDispatchMode):
    """Within the block, counts each dispatched operator but views and a profiler's marks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not func.is_view and func.namespace != "profiler":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.calls.total()

    def of(self, *names: str) -> int:
        return sum(self.calls[name] for name in names)


def operators_of(work: Callable[[], object]) -> OperatorCounter:
    """Run it once and return what was counted."""
    with OperatorCounter() as counter:
        work()
    return counter
