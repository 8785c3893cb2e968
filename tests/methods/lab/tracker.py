"""A file beside the checkpoints with a line for each evaluation."""

import json
from pathlib import Path


class Diary:
    def __init__(self, followed):
        self.path = Path(followed.checkpoints) / "diary.jsonl"

    def begin(self, trial):
        return frozenset()

    def point(self, trial, evaluation):
        with self.path.open("a") as lines:
            lines.write(json.dumps([trial.number, evaluation.step]) + "\n")

    def end(self, trial):
        pass

    def close(self):
        pass
