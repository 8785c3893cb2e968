"""The device, threads and packages that a worker computes with, and its allocator settings."""

from __future__ import annotations

import ctypes
import gc

import torch

from tuner.data import TABLE_VERSION
from tuner.installation import package_version, version

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGEST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Stop glibc from returning large blocks to the system at each free; False without glibc.

    Otherwise every tensor above some megabytes is mapped, zeroed page by page, and unmapped again: on a CPU
    that was a third of an evaluation's time (docs/log.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))


def let_go() -> None:
    """Free the memory of what is not used any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


_KERNELS = {"liger": ("liger-kernel", "triton")}
"""The packages of each `model.kernels` besides torch."""


def environment(
    device: torch.device, *, slots: int, metric: str | None = None, kernels: str = "torch"
) -> dict[str, str]:
    """Return `Attempt.environment`. `metric` is the hash of the user's metric file, None without one.

    `rows` is the version of reading rows: another number means other tokens, or masks, for some rows.
    """
    if device.type == "cuda":
        computes_with = {"device": torch.cuda.get_device_name(device)}
    else:
        # The instruction set chooses the kernels, and the number of threads the order of their sums.
        instructions = torch.backends.cpu.get_cpu_capability()
        computes_with = {"device": f"cpu ({instructions})", "threads": str(torch.get_num_threads())}
    scores_by = {} if metric is None else {"metric": metric}
    versions = {
        "tuner": version(),
        "rows": str(TABLE_VERSION),
        **{name: package_version(name) for name in (*_PACKAGES, *_KERNELS.get(kernels, ()))},
    }
    return {**computes_with, "slots": str(slots), **versions, **scores_by}
