from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.studies import round_file
from tuner.records import RoundRecord, Throughput
from tuner.study.results import round_results


@pytest.mark.parametrize(
    ("work", "share"),
    [
        ((), 0.4),
        ((Throughput("a"),), 0.4),
        ((Throughput("a", 8.0, 1.0, 1.0), Throughput("b", 8.0, 1.0, 1.0)), 0.1),
        ((Throughput("a", 1.0, 0.0, 0.0),), 0.0),
    ],
    ids=["nothing measured", "no time yet", "measured", "measured to be none"],
)
def test_what_evaluation_took_replaces_what_was_expected(
    tmp_path: Path, work: tuple[Throughput, ...], share: float
) -> None:
    spec = round_file(tmp_path).spec.model_dump(mode="json")
    record = RoundRecord("round1", 8, spec, begun_at=0.0, evaluation_share=0.4)
    assert round_results(replace(record, throughputs=work), ()).evaluation_share == pytest.approx(share)
