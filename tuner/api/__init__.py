"""The Python API: studies, rounds and trials. The command line parses and prints, and calls it."""

from __future__ import annotations


def log(step: int, **metrics: float) -> None:
    """Report metrics of a step from inside a training command; do nothing anywhere else.

    A script that calls this function also runs without tuner. Of several processes the first one reports.

    Args:
        step: Number of optimizer updates so far.
        metrics: Values by name, such as `eval_loss=2.31`; `checkpoint="..."` names the folder of a checkpoint
            that is written.
    """
    import json
    import os
    from pathlib import Path

    report = os.environ.get("TUNER_METRICS")
    if report is None or os.environ.get("RANK", "0") != "0":
        return
    with Path(report).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
