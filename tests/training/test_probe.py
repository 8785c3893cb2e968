from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.data.tiny import source, write_jsonl
from tuner.data import load_tokenizer, prepare
from tuner.records import Choices, Fixed, Range, TimesSqrtRank
from tuner.spec import RoundSpec
from tuner.training.probe import largest, probe_round


def test_largest_takes_the_most_memory() -> None:
    space = {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "lora_r": Choices((8, 64, 16)),
        "batch_size": Range(2, 9, integer=True),
        "lora_alpha": TimesSqrtRank(4.0),
        "schedule": Choices(("cosine", "linear")),
        "optimizer": Fixed("adamw"),
    }
    chosen = largest(space)
    assert (chosen["lora_r"], chosen["batch_size"]) == (64, 9)
    assert (chosen["schedule"], chosen["optimizer"]) == ("cosine", "adamw")
    assert isinstance(chosen["lora_alpha"], float)
    assert isinstance(chosen["batch_size"], int)


def test_probe_times_a_trial_and_leaves_nothing(models: tiny.Models, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Row number {n}."} for n in range(30)])
    before = set(tmp_path.iterdir())
    spec = RoundSpec.model_validate(
        {
            "study": "s",
            "round": "r",
            "model": {"path": str(models.path("llama")), "dtype": "float32"},
            "data": {"train": [source(rows, "text")], "eval_fraction": 0.2, "max_length": tiny.MAX_LENGTH},
            "max_train_steps": 1000,
            "hyperparameters": {"learning_rate": 1e-4, "lora_r": [2, 4], "batch_size": [1, 2]},
            "evaluation": {"every_steps": 100},
        }
    )
    data = prepare(spec, load_tokenizer(spec.model), None)
    measured = probe_round(spec, data)
    assert measured.seconds_per_trial > 1000 * 1e-3  # no update of two layers takes less than a millisecond
    assert measured.peak_memory_bytes > 10 * 2**20
    assert set(tmp_path.iterdir()) == before
