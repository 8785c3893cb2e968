"""The page as a browser shows it: nothing cut off, no text over another, no error, no request.

Not part of `make test`: `pytest -m acceptance tests/report/test_in_a_browser.py`, two minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.report.comparison import Compared, comparison_page
from tuner.report.html import html_page

from . import synthetic
from .browser import CHROMIUM, Browser, browser

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
    pytest.mark.acceptance,
]
BEYOND_PLOTLY_BYTES = 1_500_000


def pages() -> dict[str, str]:
    five = synthetic.report(trials_of_round=synthetic.trials()[3:])
    first, second = synthetic.two_rounds()
    return {
        "five trials": html_page(five),
        "two rounds": html_page(second, earlier=[first]),
        "200 trials": html_page(synthetic.large_report()),
        "dry run": html_page(replace(five, is_dry_run=True)),
        "two studies": comparison_page(Compared(("a", "b"), ([first], [first, second]))),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for name, text in pages().items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(text, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("name", pages())
def test_the_page(name: str, width: int, dark: bool, written: dict[str, Path], chromium: Browser) -> None:
    chromium.open(written[name], width=width, dark=dark)
    assert chromium.problems == []
    assert chromium.cut_off == []
    assert chromium.overlaps == []
    assert chromium.value("document.querySelectorAll('.plot.drawn .main-svg').length") >= 1
    assert chromium.height < 1.1 * (9_500 if "trials" in name else 18_000)


@pytest.mark.parametrize("name", pages())
def test_a_page_is_small_beside_plotly(name: str, written: dict[str, Path]) -> None:
    text = written[name].read_text(encoding="utf-8")
    library = text.partition('id="plotly">')[2].partition("</script>")[0]
    assert len(text) - len(library) < BEYOND_PLOTLY_BYTES
    assert text.count('id="plotly"') == 1


def test_what_is_cut_off_or_overlaps_is_found(tmp_path: Path, chromium: Browser) -> None:
    """The checks above can fail."""
    (tmp_path / "page.html").write_text(html_page(synthetic.report()), encoding="utf-8")
    chromium.open(tmp_path / "page.html", width=1280)
    assert (chromium.cut_off, chromium.overlaps, chromium.problems) == ([], [], [])
    texts = '<text y="20">one</text><text y="22">two</text>'
    wrong = f'<div style="width: 3000px">wide</div><div class="plot"><svg>{texts}</svg></div>'
    chromium.value(f"document.querySelector('main').insertAdjacentHTML('beforeend', `{wrong}`)")
    chromium.value("console.error('broken'), fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert chromium.cut_off
    assert chromium.overlaps == ["one / two"]
    assert "broken" in chromium.problems[0]
    assert len(chromium.problems) > 1, "the page's policy forbids the request"
