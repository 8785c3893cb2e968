"""tuner finds hyperparameters for LoRA fine-tuning and tells you how long to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.api import log
    from tuner.api.advice import Advice, advise
    from tuner.api.round import Round
    from tuner.api.study import Study
    from tuner.api.trial import Trial

    __version__: str

__all__ = ["Advice", "Round", "Study", "Trial", "__version__", "advise", "log"]

_HOMES = {
    "Advice": "tuner.api.advice",
    "Round": "tuner.api.round",
    "Study": "tuner.api.study",
    "Trial": "tuner.api.trial",
    "advise": "tuner.api.advice",
    "log": "tuner.api",
}
"""Where each name is defined; loaded when it is first used, so that `import tuner` costs nothing."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from tuner.installation import version

        found: Any = version()
    elif name in _HOMES:
        from importlib import import_module

        found = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
