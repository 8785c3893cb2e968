"""Make the pictures of the documentation from a real study: `make pictures`, two minutes on two cores.

Runs both rounds of studies/quickstart in a temporary folder. The live view is drawn from the events of round1
while it runs; the report is the page of `tuner study report`, as Chromium shows it.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from tests.report.browser import browser  # noqa: E402
from tuner.api.run import Where, run_here  # noqa: E402
from tuner.api.study import Study  # noqa: E402
from tuner.config import load_round  # noqa: E402
from tuner.records import Event, Trial, searched  # noqa: E402
from tuner.report.board import Board, board_table  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1180, 1290
"""Of the picture of the report, in pixels."""
COLUMNS = 96
"""Of the terminal."""
SHARE = 0.7
"""Of the round's steps, when the live view is drawn."""


class Photographer:
    """A View that draws the live view once, in the middle of the round."""

    def __init__(self, board: Board, *, title: str, names: Sequence[str]) -> None:
        self._board, self._title, self._names = board, title, names
        self.picture = ""

    def event(self, event: Event) -> None:
        """As `View` says."""
        self._board.take(event, now=time.monotonic())
        if not self.picture and self._board.done_share > SHARE:
            self.picture = self._drawn()

    def trials(self, trials: Sequence[Trial]) -> None:
        """As `View` says."""
        self._board.sync(trials)

    def message(self, text: str) -> None:
        """As `View` says."""

    def close(self) -> None:
        """As `View` says."""

    def _drawn(self) -> str:
        console = Console(file=io.StringIO(), record=True, width=COLUMNS, force_terminal=True)
        console.print(
            board_table(
                self._board, title=self._title, searched=self._names, now=time.monotonic(), max_rows=None
            )
        )
        drawn = console.export_svg(title="tuner study run round1.yaml")
        return re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)  # fonts of another host


def main() -> None:
    """Run the study and write the pictures."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "quickstart"
        shutil.copytree(
            ROOT / "studies" / "quickstart", folder, ignore=shutil.ignore_patterns("runs", "*.db*", "round2*")
        )
        first = load_round(folder / "round1.yaml")
        photographer = Photographer(
            Board(trials_total=first.spec.num_trials, max_train_steps=first.spec.max_train_steps),
            title=f"{first.spec.study}/{first.spec.round}",
            names=tuple(searched(first.spec.space())),
        )
        run_here(first, Where(), open_view=lambda file, gpus: photographer, stopping=lambda: False)
        (IMAGES / "live.svg").write_text(photographer.picture, encoding="utf-8")
        study = Study(folder)
        study.promote("round2")
        study.run("round2.yaml", progress=False)
        page = folder / "report.html"
        study.round("round2").report(page)
        # The temporary folder says nothing to a reader.
        page.write_text(page.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")
        with browser(Path(place) / "profile") as chromium:
            chromium.open(page, width=WIDTH)
            chromium.screenshot(IMAGES / "report.png", height=HEIGHT)
            problems = [*chromium.problems, *chromium.cut_off, *chromium.overlaps]
            if problems:
                raise SystemExit(f"the report is not as it should be: {problems}")
    print(f"wrote {IMAGES / 'live.svg'} and {IMAGES / 'report.png'}")


if __name__ == "__main__":
    main()
