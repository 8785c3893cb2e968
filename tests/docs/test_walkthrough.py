"""The tutorial and the readme's examples, typed command by command; what they show has to appear.

`tuner` runs in this process, which spares it the seconds that a process of its own takes to load.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.docs.test_documents import ROOT, prose_and_blocks
from tests.recorded.test_unchanged import check_quickstart
from tests.studies import tuner

TUTORIAL, README = ROOT / "docs" / "tutorial.md", ROOT / "README.md"
WIDTH = 120

_MARK = "=== typed: "
_DURATION = re.compile(r"\b\d+ (?:s|min|h)\b(?: \d\d (?:s|min)\b)?")
_PATH_BEFORE_STUDIES = re.compile(r"(?<![\w.])/\S*?/(?=studies/)")
_TOKEN = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?|[^\W\d]+|[^\w\s]")


@dataclass(frozen=True)
class Shown:
    """A block of output in a document, after the command that printed it."""

    command: str
    pieces: tuple[str, ...]
    """What stands between the dots that leave something out, in order."""


def typed_and_shown(path: Path) -> tuple[list[str], list[Shown]]:
    """Commands of a document's console blocks, and the outputs that follow them in text blocks.

    A block shows what the commands of the console block before it print; one that begins with `$ ` shows
    commands and their outputs together, and is an excerpt of another document.
    """
    commands: list[str] = []
    shown: list[Shown] = []
    block: list[str] = []
    for language, body in prose_and_blocks(path)[1]:
        if language == "console":
            block = [line.strip().removeprefix("$ ") for line in body.splitlines() if line.strip()]
            commands += block
        elif language == "text" and body.startswith("$ "):
            for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                shown.append(Shown(command.strip(), _pieces(output)))
        elif language == "text" and block:
            shown.append(Shown("\n".join(block), _pieces(body)))
    return commands, shown


def _pieces(body: str) -> tuple[str, ...]:
    return tuple(piece for piece in body.split("...") if piece.strip())


def type_in_a_shell(commands: Sequence[str], directory: Path) -> dict[str, str]:
    """What each command prints on either stream, in one shell that stops at the first failure."""
    script = "\n".join(f"printf '\\n{_MARK}%s\\n' {number}\n{line}" for number, line in enumerate(commands))
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", f"exec 2>&1\n{script}"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": binaries, "COLUMNS": str(WIDTH), "OMP_NUM_THREADS": "1"},
    )
    outputs = [part.partition("\n") for part in done.stdout.split(f"\n{_MARK}")[1:]]
    last = commands[len(outputs) - 1]
    assert done.returncode == 0, f"{last}: exit {done.returncode}\n{done.stdout[-4000:]}"
    assert len(outputs) == len(commands)
    return {command: output for command, (_, _, output) in zip(commands, outputs, strict=True)}


def type_here(commands: Sequence[str], directory: Path) -> dict[str, str]:
    """What each command prints on either stream: `tuner` in this process, the others in a shell."""
    here, printed = directory, {}
    for line in commands:
        match shlex.split(line, comments=True):
            case ["cd", to]:
                here, printed[line] = here / to, ""
            case ["tuner", *words]:
                done = tuner(*words, directory=here, columns=WIDTH, merged=True)
                assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stdout[-4000:]}"
                printed[line] = done.stdout
            case _:
                printed |= type_in_a_shell([line], here)
    return printed


def tokens(text: str) -> list[str]:
    """Words, numbers and signs; durations and the place of the repository are no part of them."""
    return _TOKEN.findall(_DURATION.sub(" TIME ", _PATH_BEFORE_STUDIES.sub("", text)))


def is_like(one: str, other: str) -> bool:
    """Equal, or both numbers: another processor rounds otherwise, and training makes that grow."""
    return one == other or (one[0].isdigit() and other[0].isdigit())


def end_of(piece: Sequence[str], output: Sequence[str], start: int) -> int | None:
    """Where a piece ends in an output, searched from `start`; None if it is not there."""
    for at in range(start, len(output) - len(piece) + 1):
        if all(is_like(a, b) for a, b in zip(piece, output[at:], strict=False)):
            return at + len(piece)
    return None


def missing(shown: Shown, printed: dict[str, str]) -> Iterator[str]:
    """Pieces that the commands have not printed in this order."""
    output = tokens("\n".join(printed[command] for command in shown.command.split("\n")))
    at = 0
    for piece in shown.pieces:
        end = end_of(tokens(piece), output, at)
        if end is None:
            yield piece.strip()
        else:
            at = end


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the tutorial's commands need."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("base", "data"):
        shutil.copytree(ROOT / "studies" / "quickstart" / name, copy / "studies" / "quickstart" / name)
    shutil.copy(ROOT / "studies" / "quickstart" / "round1.yaml", copy / "studies" / "quickstart")
    return copy


@pytest.fixture(scope="module")
def printed(clone: Path) -> dict[str, str]:
    """The tutorial's commands with what they print, typed in the clone."""
    return type_here(typed_and_shown(TUTORIAL)[0], clone)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("printed")
def test_the_rounds_of_the_tutorial_are_what_they_were(clone: Path) -> None:
    """Its study is that of `make quickstart`, whose rounds are recorded."""
    check_quickstart(clone / "studies" / "first")


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_the_tutorial_shows_what_its_commands_print(printed: dict[str, str]) -> None:
    shown = typed_and_shown(TUTORIAL)[1]
    assert len(shown) >= 7
    for block in shown:
        assert list(missing(block, printed)) == [], printed[block.command.split("\n")[0]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """With the quickstart's base and 120 of its rows, and short trials."""
    commands = typed_and_shown(README)[0]
    rows = (ROOT / "studies" / "quickstart" / "data" / "train.jsonl").read_text().splitlines()[:120]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    model, base = "HuggingFaceTB/SmolLM2-135M-Instruct", ROOT / "studies" / "quickstart" / "base"
    assert model in commands[0]
    assert commands[1] == "cd alpaca"
    shorter = (
        "sed -i 's/^max_train_steps: .*/max_train_steps: 8/; s/decay_steps: .*/decay_steps: 3/; "
        "s/trials: .*/trials: 2/; s/{low: 1e-5, high: 3e-3/{low: 3e-3, high: 2e-2/' round1.yaml"
    )
    typed = [commands[0].replace(model, str(base)), commands[1], shorter, *commands[2:]]
    output = type_here(typed, tmp_path)
    assert len(output) == 6
    assert "Its adapter:" in output[typed[-1]]  # a long path is on the next line


def test_a_document_is_cut_into_commands_and_outputs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ one\n$ two  # why\n```\n```text\nfirst\n...\nlast 1.00\n```\n"
        "```yaml\na: 1\n```\n```text\n$ three\nof it\n$ four\nmore ...\n```\n"
    )
    assert typed_and_shown(page) == (
        ["one", "two  # why"],
        [
            Shown("one\ntwo  # why", ("first\n", "\nlast 1.00\n")),
            Shown("three", ("of it\n",)),
            Shown("four", ("more ",)),
        ],
    )


@pytest.mark.parametrize(
    ("piece", "is_there"),
    [
        ("loss 1.04", True),
        ("loss 1.20", True),
        ("lost 1.05", False),
        ("step 81 of 90", True),
        ("step of 90", False),
        ("about 1 min 05 s left", True),
        ("wrote /home/me/studies/first/x", True),
        ("left wrote", True),
    ],
)
def test_numbers_may_differ_and_words_may_not(piece: str, is_there: bool) -> None:
    output = "loss\n1.05 at step  80 of 90, about 7 s left\nwrote /tmp/q/studies/first/x"
    assert (list(missing(Shown("c", (piece,)), {"c": output})) == []) == is_there


def test_pieces_have_to_come_in_order() -> None:
    assert list(missing(Shown("c", ("a", "b")), {"c": "a b"})) == []
    assert list(missing(Shown("c", ("b", "a")), {"c": "a b"})) == ["a"]


def test_the_program_is_on_the_path(tmp_path: Path) -> None:
    printed = type_in_a_shell(["tuner --version"], tmp_path)
    assert re.match(r"tuner \d", printed["tuner --version"])


def test_a_shell_stops_at_the_first_failure(tmp_path: Path) -> None:
    assert type_in_a_shell(["cd /", "pwd"], tmp_path) == {"cd /": "", "pwd": "/\n"}
    with pytest.raises(AssertionError, match="false: exit 1"):
        type_in_a_shell(["true", "false", "pwd"], tmp_path)
