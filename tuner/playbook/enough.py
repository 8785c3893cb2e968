"""When a study has had enough rounds: no longer one is worth running."""

from __future__ import annotations

from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reading import Reading


def enough(reading: Reading, *, max_train_steps: int) -> str | None:
    """Why no further round is run without a person's say; None where a longer one is worth it.

    Only `too_short` with a longer horizon that may be paid for asks for another round. Rule: Deep Learning
    Tuning Playbook, "Deciding the number of steps for each training run"; that the other diagnoses end a
    study is this project's decision.
    """
    match reading.diagnosis:
        case _ if not reading.leading:
            return "no trial is complete, so nothing says how long to train"
        case Diagnosis.TOO_SHORT:
            longer = (reading.suggested_max_train_steps or 0) > max_train_steps
            return None if longer else "longer runs than run.production_steps are not to be paid for"
        case Diagnosis.NO_LEARNING:
            return "training did not help: look at data, loss masks and learning rates first"
        case Diagnosis.UNDETERMINED:
            return "the round cannot tell whether more steps would help; its report says what would"
        case Diagnosis.OVERFITTING:
            return "the best trial overfits, so more steps would not help"
        case Diagnosis.TOO_LONG | Diagnosis.SATURATED:
            return f"more than {max_train_steps} steps would not help"
        case Diagnosis.RIGHT:
            return f"{max_train_steps} steps are about right"
