"""What a worker computes with, so far as it can change the last digits of a loss."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("tuner", "torch", "transformers", "peft", "bitsandbytes")


def environment(device: torch.device, *, slots: int) -> dict[str, str]:
    """As `Attempt.environment` keeps it: device, threads on a CPU, slots, and versions of packages."""
    if device.type == "cuda":
        computes_with = {"device": torch.cuda.get_device_name(device)}
    else:
        # The instruction set chooses the kernels, and the number of threads the order of their sums.
        instructions = torch.backends.cpu.get_cpu_capability()
        computes_with = {"device": f"cpu ({instructions})", "threads": str(torch.get_num_threads())}
    return {**computes_with, "slots": str(slots), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
