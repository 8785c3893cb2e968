"""Answers are compared word for word or by the user's function, whose mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tuner.data import load_metric, refuse_unlike_metric
from tuner.errors import MetricError

NEIGHBOUR = "LIMIT = 3\n"
METRICS = """
from neighbour_of_a_metric import LIMIT
from fractions import Fraction

def overlap(answer, reference):
    print("the metric talks")
    return Fraction(len(set(answer.split()) & set(reference.split())), LIMIT)

class Judge:
    @staticmethod
    def agrees(answer, reference):
        return answer == reference

def divides(answer, reference):
    return 1 / len(answer)

def leaves(answer, reference):
    raise SystemExit("enough")

def nan(answer, reference):
    return float("nan")

def huge(answer, reference):
    return -1e101

def several(answer, reference):
    import numpy
    return numpy.zeros(2)

def text(answer, reference):
    return "0.5"

def nothing(answer, reference):
    pass

number = 3
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (tmp_path / "neighbour_of_a_metric.py").write_text(NEIGHBOUR)
    (tmp_path / "metrics.py").write_text(METRICS)
    return tmp_path / "metrics.py"


def score(name: str, answer: str, reference: str) -> float:
    return load_metric(name)(answer, reference, place="eval.jsonl:7")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Red and\n blue ", 1.0),
        ("Red  and blue", 1.0),
        ("red and blue", 0.0),
        ("Redand blue", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_looks_past_white_space_alone(answer: str, expected: float) -> None:
    assert score("exact_match", answer, " Red and blue") == expected


def test_a_function_of_a_file_and_its_neighbours(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints does not reach standard output, where events and documents are."""
    assert score(f"{metrics}:overlap", "red blue", "blue red green") == pytest.approx(2 / 3)
    assert score(f"{metrics}:Judge.agrees", "red", "red") == 1.0
    assert score("operator:eq", "red", "blue") == 0.0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "the metric talks\n")
    codes = {load_metric(f"{metrics}:{name}").code for name in ("overlap", "Judge.agrees")}
    metrics.write_text(f"{METRICS}# another file\n")
    assert len(codes | {load_metric(f"{metrics}:overlap").code}) == 2
    assert load_metric("exact_match").code is None


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("divides", r"it raised ZeroDivisionError: division by zero \(.*metrics.py:\d+\)"),
        ("leaves", "it raised SystemExit: enough"),
        ("nan", "it returned nan, not a finite number"),
        ("huge", "it returned -1e[+]101, which is beyond 1e[+]100"),
        ("several", "it raised TypeError: only"),
        ("text", "it returned '0.5', not a number"),
        ("nothing", "it returned None, not a number"),
    ],
)
def test_a_function_at_fault_is_named_with_what_it_was_called_with(
    metrics: Path, function: str, what: str
) -> None:
    called = f"metrics.py:{function}, called with answer '' and reference 'Red' \\(eval.jsonl:7\\)"
    with pytest.raises(MetricError, match=f"^evaluation.answers.metric: {called}: {what}"):
        score(f"{metrics}:{function}", "", "Red")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("{folder}/gone.py:f", "gone.py:f: there is no file .*gone.py; write exact_match"),
        (
            "no.such.module:f",
            "no.such.module cannot be imported: ModuleNotFoundError: No module named 'no'; write",
        ),
        ("{folder}/broken.py:f", r"cannot be imported: ValueError: at once \(.*broken.py:1\)"),
        ("{folder}/metrics.py:overlaps", "has no function overlaps; it has .*overlap"),
        ("{folder}/metrics.py:number", "has no function number"),
    ],
)
def test_a_function_that_is_not_there(metrics: Path, name: str, what: str) -> None:
    (metrics.parent / "broken.py").write_text("raise ValueError('at once')\n")
    with pytest.raises(MetricError, match=what):
        load_metric(name.format(folder=metrics.parent))


SOURCE = """
from fractions import Fraction as told
import os.path
raise SystemExit("imported")
def one(answer): return 1
def two(answer, reference, /, *, scale=1): return scale
def three(answer, reference, scale): return 1
def more(answer, *others): return 1
def named(answer, reference, *, scale): return 1
async def later(answer, reference): return 1
@told
def made(answer): pass
if told:
    def either(answer): return 1
else:
    def either(answer, reference): return 1
def starts():
    global begun
    begun = two
class Judge:
    @staticmethod
    def agrees(answer, reference): return 1
    @staticmethod
    def alone(answer): return 1
    def bound(self, answer, reference): return 1
    def __call__(self, answer, reference): return 1
class Other(Judge): pass
class Score:
    def __init__(self, answer, reference): self.score = 1
class Number(object):
    def __init__(self, answer, reference): self.score = 1
    def __float__(self): return 1.0
class Float:
    def __init__(self, answer, reference): self.score = 1
    def __float__(self): return 1.0
judge = Judge()
short = lambda answer, reference: 1
narrow = lambda answer: 1
number: int = 3
several = [1, 2]
again = 3
for again in [two]: pass
def generates(answer, reference): yield 1
def forgets(answer, reference):
    def inner(): return 1
    if answer: return
    inner()
def delegates(answer, reference):
    with open(answer) as file:
        return len(file.read())
"""


@pytest.mark.parametrize(
    "function",
    [
        *("two", "more", "made", "either", "begun", "told", "short", "again", "delegates"),
        *("judge", "Judge.agrees", "Other", "Other.agrees", "Other.bound", "Number", "Float"),
    ],
)
def test_a_source_that_may_have_the_function(tmp_path: Path, function: str) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    refuse_unlike_metric(f"{tmp_path / 'source.py'}:{function}")
    with pytest.raises(MetricError, match=f"has no function no_{function}"):
        refuse_unlike_metric(f"{tmp_path / 'source.py'}:no_{function}")


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("one", "source.py, line 5: one takes one argument; it must be a function that takes two texts"),
        ("three", "line 7: three needs 3 arguments"),
        ("starts", "starts takes no arguments"),
        ("named", "line 9: named needs the argument scale by name"),
        ("later", "later is asynchronous"),
        ("generates", "generates is a generator"),
        ("forgets", "forgets returns nothing; it must be a function that .* returns a number"),
        ("narrow", "narrow takes one argument"),
        ("Judge", "Judge is a class that takes no arguments"),
        ("Score", "Score is a class, whose objects are no numbers"),
        ("Judge.alone", "Judge.alone takes one argument"),
        ("Judge.bound", "Judge.bound needs 3 arguments"),
        ("Judge.gone", "has no function Judge.gone; it has agrees, .*; write exact_match"),
        ("gone", "has no function gone; it has one, two, three"),
        ("number", "source.py, line [0-9]+: number is a value; it must be a function"),
        ("several", "several is a value"),
    ],
)
def test_a_source_that_has_no_such_function(tmp_path: Path, function: str, what: str) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    with pytest.raises(MetricError, match=what):
        refuse_unlike_metric(f"{tmp_path / 'source.py'}:{function}")


@pytest.mark.parametrize("look", [refuse_unlike_metric, load_metric])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("empty.py:f", "empty.py has no function f; it has none; write exact_match"),
        ("folder.py:f", "folder.py is a directory; write exact_match"),
        ("gone.py:f", "there is no file .*gone.py; write exact_match"),
    ],
)
def test_what_is_not_there_is_said_alike_before_and_after_importing(
    tmp_path: Path, look: Callable[[str], object], name: str, what: str
) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(MetricError, match=what):
        look(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("{folder}/gone.py:f", "gone.py:f: there is no file .*gone.py; write exact_match"),
        ("{folder}/broken.py:f", "broken.py is not Python in line 1: "),
        ("{folder}/zeros.py:f", "zeros.py (is not Python|cannot be read)"),
        ("no.such.module:f", "no.such.module:f: there is no module no; write"),
        ("trap_of_metrics.gone:f", "there is no module trap_of_metrics.gone"),
        ("trap_of_metrics.inner:g", "trap_of_metrics.inner has no function g; it has f"),
        ("only_files:f", "only_files is a folder without .*__init__.py; name one of its modules, as in only"),
    ],
)
def test_a_module_is_found_without_importing_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trap_of_metrics").mkdir()
    for file in ("__init__.py", "inner.py"):
        (tmp_path / "trap_of_metrics" / file).write_text(
            "def f(a, b): return 1\nraise SystemExit('imported')\n"
        )
    (tmp_path / "only_files").mkdir()
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "zeros.py").write_bytes(b"\0" * 9)
    with pytest.raises(MetricError, match=what):
        refuse_unlike_metric(name.format(folder=tmp_path))
    for known in ("trap_of_metrics.inner:f", "operator:eq", "os.path:commonprefix", "math:dist", "sys:gone"):
        refuse_unlike_metric(known)
