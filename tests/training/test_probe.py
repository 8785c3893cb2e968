from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.data.tiny import source, write_jsonl
from tuner.data import PreparedData, load_tokenizer, prepare
from tuner.records import Choices, Fixed, Range, TimesSqrtRank
from tuner.spec import RoundSpec
from tuner.training.opening import arrange
from tuner.training.probe import largest_hyperparameters, predict, probe


def test_largest_takes_the_most_memory() -> None:
    space = {
        "learning_rate": Range(1e-5, 1e-3, log=True),
        "lora_r": Choices((8, 64, 16)),
        "batch_size": Range(2, 9, integer=True),
        "lora_alpha": TimesSqrtRank(4.0),
        "schedule": Choices(("cosine", "linear")),
        "optimizer": Fixed("adamw"),
    }
    chosen = largest_hyperparameters(space)
    assert (chosen["lora_r"], chosen["batch_size"]) == (64, 9)
    assert (chosen["schedule"], chosen["optimizer"]) == ("cosine", "adamw")
    assert isinstance(chosen["lora_alpha"], float)
    assert isinstance(chosen["batch_size"], int)


def test_probe_times_a_trial_and_leaves_nothing(models: tiny.Models, tmp_path: Path) -> None:
    spec, data = _round(models, tmp_path)
    before = set(tmp_path.iterdir())
    place = arrange(spec, data, slots=3)
    predicted = predict(place, spec)
    assert predicted.slots == 3
    # No update of two layers takes a tenth of a millisecond, and no evaluation of a few rows.
    assert min(predicted.seconds_per_step, predicted.seconds_per_evaluation) > 1e-4
    assert predicted.peak_memory_bytes > 10 * 2**20
    probed = probe(place, largest_hyperparameters(spec.space()))
    longest = int(data.train.num_tokens.max())
    assert list(probed.tokens) == sorted(set(probed.tokens))
    assert all(tokens % longest == 0 for tokens in probed.tokens)
    assert min(probed.seconds) > 0
    assert set(tmp_path.iterdir()) == before


def test_auto_is_one_slot_on_a_cpu(models: tiny.Models, tmp_path: Path) -> None:
    assert arrange(*_round(models, tmp_path), slots="auto").pack.num_slots == 1


def _round(models: tiny.Models, directory: Path) -> tuple[RoundSpec, PreparedData]:
    rows = write_jsonl(directory / "rows.jsonl", [{"text": f"Row number {n}."} for n in range(30)])
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
    return spec, prepare(spec, load_tokenizer(spec.model), None)
