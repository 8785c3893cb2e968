"""A command of one's own: every hyperparameter is passed by its name, and tuner sets nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tuner.methods.tools import UNKNOWN_SCHEDULE, Mistaken, Settings, Tool, TrialSettings, bare
from tuner.records import Space


def _settings(trial: TrialSettings) -> dict[str, Any]:
    written = {bare(name): value for name, value in trial.hyperparameters.items()}
    if written.get("schedule") == UNKNOWN_SCHEDULE:
        del written["schedule"]
    return written


def _mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    yield from ()


NONE = Tool(
    name="none",
    meaning="A script of your own. Any name may be searched, and is passed as it is. If the script follows "
    "a schedule of tuner's, name it (`schedule: linear`, `decay_steps`), so that trials can resume.",
    hyperparameters=(
        "learning_rate", "batch_size", "warmup_steps", "schedule", "decay_steps", "decay_shape",
        "training_seed",
    ),
    takes_any_name=True,
    settings=_settings,
    mistakes=_mistakes,
)  # fmt: skip
