"""The cells have the shapes that results are compared by, and a machine without a GPU is told so."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packing.py"


@pytest.fixture(scope="module")
def packing() -> ModuleType:
    specification = importlib.util.spec_from_file_location("packing_benchmark", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["packing_benchmark"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_tiny_cell_is_what_it_has_always_been(packing: ModuleType) -> None:
    cell = packing.TINY
    assert cell.shape == {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
    }
    assert (cell.micro_rows, cell.tokens, cell.accumulation, cell.steps) == (2, 64, 4, 60)
    assert (cell.evaluation_rows, cell.evaluate_every, cell.dtype) == (64, 10, "float32")
    trials = [packing.hyperparameters(number, cell) for number in range(2)]
    assert (trials[0]["lora_r"], trials[0]["target_modules"]) == (16, "all-linear")
    assert trials[0] != trials[1]


def test_the_cells_of_a_gpu(packing: ModuleType) -> None:
    cells = packing.gpu_cells()
    assert [(cell.name, cell.micro_tokens) for cell in cells] == [
        (name, tokens) for name in ("1B", "7B", "7B-nf4") for tokens in (256, 1024, 4096)
    ]
    assert {(cell.dtype, cell.quantization) for cell in cells} == {("bfloat16", "none"), ("bfloat16", "nf4")}


def test_a_machine_without_a_gpu_is_told(packing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing.parse_arguments([]).trials == [1, 2, 4, 8]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        packing.parse_arguments(["--cells", "gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert packing.parse_arguments(["--cells", "gpu"]).trials == [1, 2, 4, 8, 16]


def test_what_packing_can_gain(packing: ModuleType) -> None:
    """Of passes that cost a second and a second a token: eight of four tokens in one take 33 s, not 40."""
    limit = packing.Limit(1.0, 1.0)
    assert limit.speed_up(4, 8) == pytest.approx(8 * 5 / 33)
    assert limit.speed_up(4, 1) == 1.0


def test_ratios_are_of_medians_and_say_how_much_faster_packed_is(packing: ModuleType) -> None:
    def took(*seconds: float) -> list[object]:
        return [packing.Measurement(s, s / 2, 2**30, (1.0,)) for s in seconds]

    row = packing.table_row(
        packing.TINY, 8, took(1, 2, 9), took(4, 4, 4), took(3, 3, 90), 2.0, packing.Limit(0, 1)
    )
    values = dict(zip(packing._COLUMNS, (part.strip() for part in row.strip("|").split("|")), strict=True))
    assert (values["round / Trainer"], values["round / K = 1"], values["K"]) == ("3.00", "2.00", "8")
    assert values["trial-steps/s"] == "480.0"
