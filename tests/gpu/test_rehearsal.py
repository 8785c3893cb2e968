"""`make gpu` as far as a CPU goes: it refuses, says what it will take, and its parts run with tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tuner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))  # benchmarks are not installed
        import benchmarks.gpu

    return benchmarks.gpu  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine that has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def test_a_machine_without_a_gpu_is_told(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main([])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "no CUDA GPU: torch.cuda.is_available() is False" in said
    assert "--rehearse" in said


def test_a_part_that_does_not_exist(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["equality", "doctor"])
    assert refused.value.code == 2
    assert "no part equality; there are doctor" in capsys.readouterr().err


def test_each_part_says_what_it_takes(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    parts = gpu.parts()
    assert {"doctor", "tests", "equality-bf16", "equality-nf4", "real-all", "smollm2"} < parts.keys()
    assert parts["real-varlen"].says == "K = 8, Alpaca's lengths, varlen"
    cells = [name for name in parts if name.startswith("packing-")]
    assert len(cells) == 9
    assert all(60 * part.minutes < gpu.LIMIT_SECONDS for part in parts.values())
    assert parts["packing-1B-256"].says.startswith("K = 1 to 16 ")
    assert parts["packing-7B-4096"].says.startswith("K = 1 to 4 ")
    assert gpu.main(["--list", "doctor"]) == 0
    assert "about 0.5 min" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "holds"),
    [
        ((1e-3, 1e-3, 0.0), True),
        ((3e-3, 1e-4, 2e-3), True),
        ((5e-3, 1e-4, 2e-3), False),
        ((1e-4, 5e-3, 2e-3), False),
        ((float("nan"), 1e-4, 2e-3), False),
        ((1e-4, 1e-4, float("nan")), True),
    ],
)
def test_what_counts_as_equal(gpu: SimpleNamespace, numbers: tuple[float, ...], holds: bool) -> None:
    assert gpu.Differences(*numbers).holds is holds


def test_varlen_is_rehearsed_with_torchs_attention(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """The row beside it on the page is of the same cell."""
    cell = gpu.packing.varlen_cell(gpu.packing.gpu_cells()[0])
    beside = gpu.packing.real_cells(gpu.packing.gpu_cells()[0])[0]
    assert replace(cell, name=beside.name, attention="torch") == beside
    assert gpu.packing.round_spec(cell, tmp_path).model.attention == "varlen"
    assert gpu.packing.round_spec(gpu.small(cell), tmp_path).model.attention == "torch"


def test_packed_is_alone_and_trainer(gpu: SimpleNamespace) -> None:
    found = gpu.measure_differences("none", rehearse=True)
    assert found.holds, found
    assert found.trainer > 0, "two programs that agree in every bit are probably one"


def test_what_fails_and_what_takes_too_long_is_on_the_page(gpu: SimpleNamespace) -> None:
    fails = gpu.of_command([sys.executable, "-c", "raise SystemExit('no room')"])
    late = gpu.run_apart(gpu.parts()["doctor"], rehearse=True, limit_seconds=0.01)
    assert not fails.holds
    assert not late.holds
    found = {
        "tests": {"holds": fails.holds, "text": fails.text, "seconds": 60.0},
        "doctor": {"holds": late.holds, "text": late.text, "seconds": 0.01},
        "smollm2": {"holds": True, "text": "a table", "seconds": 90.0},
    }
    page = gpu.page("NVIDIA H100", found)
    assert "| [tests](#tests) | **does not hold** | 1.0 |" in page
    assert "no room" in page
    assert "Stopped after" in page
    assert "| [smollm2](#smollm2) | holds | 1.5 |" in page


def test_a_part_that_is_stopped_leaves_the_rows_that_it_had(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", options["timeout"], stderr=b"loading\n| 7B | 4096 | 1 |\n")

    monkeypatch.setattr(subprocess, "run", stop)
    stopped = gpu.run_apart(gpu.parts()["packing-7B-4096"], rehearse=False)
    assert not stopped.holds
    assert stopped.text == "Stopped after 8 minutes.\n\n| 7B | 4096 | 1 |"


def test_without_the_model_a_round_of_its_shape_is_run(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a network; here with fewer weights."""
    tiny = gpu.small(gpu.packing.SMOLLM2)
    monkeypatch.setattr(gpu.packing, "SMOLLM2", replace(tiny, shape=tiny.shape | {"vocab_size": 2048}))
    study = ROOT / "studies" / "alpaca-smollm2"
    gpu.write_round(study, tmp_path, rehearse=False, is_stand_in=True)
    checked = tuner.Study(tmp_path).check("round1.yaml")
    assert checked["ok"], checked
    text = (tmp_path / "round1.yaml").read_text()
    assert "bfloat16" in text
    assert "format: text" in text


@pytest.mark.acceptance
def test_the_whole_rehearsal(gpu: SimpleNamespace, tmp_path: Path) -> None:
    """One of each kind of part, each in a process of its own, and then one part again."""
    chosen = ["doctor", "tests", "equality-nf4", "packing-1B-256", "smollm2"]
    assert gpu.main(["--rehearse", "--out", str(tmp_path), *chosen]) == 0
    (page,) = tmp_path.glob("packing_a-CPU-rehearsed_*.md")
    assert page.read_text().count("| holds |") == len(chosen)
    assert page.read_text().count("| 1B | 32 |") == 2
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "doctor"]) == 0
    (kept,) = tmp_path.glob("gpu_*.json")
    assert list(json.loads(kept.read_text())) == chosen
