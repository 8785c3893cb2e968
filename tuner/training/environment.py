"""What a worker computes with, so far as it can change the last digits of a loss, or how answers score."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import torch

from tuner.data import TABLE_VERSION
from tuner.installation import version

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def environment(device: torch.device, *, slots: int, metric: str | None = None) -> dict[str, str]:
    """As `Attempt.environment` keeps it. `metric` is the hash of the file of a user's, None without any.

    `rows` says how rows are read: another number stands for other tokens, or masks, of some.
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
        **{name: _version(name) for name in _PACKAGES},
    }
    return {**computes_with, "slots": str(slots), **versions, **scores_by}


def _version(package: str) -> str:
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"
