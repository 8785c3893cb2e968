"""The quickstart's notebook runs, and the page on the library quotes it."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.recorded.test_unchanged import copy_quickstart
from tests.studies import QUICKSTART

NOTEBOOK = QUICKSTART / "quickstart.ipynb"
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-from-python.md"

SHORTER = {
    "max_train_steps: 45": "max_train_steps: 15",
    "decay_steps: 15": "decay_steps: 5",
    "trials: 8": "trials: 3",
}


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_page_says_what_the_notebook_does():
    blocks = re.findall(r"^```python\n(.*?)\n```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    for block in blocks:
        assert block in code_cells()


def test_the_notebook_is_committed_without_its_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the notebook runs in."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def notebook(directory: Path) -> Any:
    """The notebook with its outputs, run on the CPU with fewer and shorter trials."""
    copy_quickstart(directory)
    file = directory / "round1.yaml"
    text = file.read_text()
    for long, short in SHORTER.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    file.write_text(text)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(directory)}}).execute()
    return notebook


@pytest.mark.slow
def test_the_notebook_runs_two_rounds_shows_them_and_generates(notebook):
    shown = [
        "".join(str(output.get("text", "")) + str(output.get("data", {})) for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert re.search(r"Train for \d+ steps next", shown[0])
    assert "params_learning_rate" in shown[2]
    assert "text/html" in shown[3]
    assert "application/vnd.plotly" in shown[4]
    assert "runs/round2/trial-" in shown[5] or "runs/round1/trial-" in shown[5]
    assert "trainable params" in shown[6]
    assert re.search(r"\['.*', '.*'\]", shown[7]), "two answers"
    assert "too_short" in shown[8]
