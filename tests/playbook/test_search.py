import pytest

from tuner.playbook.observations import default_sampler, search_findings, startup_trials
from tuner.records import Choices, Fixed, Range


def test_explore_first_then_exploit():
    assert default_sampler(knows_good_trials=False)[0] == "quasi-random"
    assert default_sampler(knows_good_trials=True)[0] == "tpe"
    for before in ("tpe", "random", "grid"):
        assert default_sampler(knows_good_trials=True, before=before)[0] == "tpe"
    assert default_sampler(knows_good_trials=True, before="gp")[0] == "gp"
    assert default_sampler(knows_good_trials=False, before="gp")[0] == "quasi-random"


@pytest.mark.parametrize(
    ("enqueued", "total", "expected"),
    [(3, 5, 3), (3, 8, 4), (0, 40, 10), (3, 100, 10), (0, 1, 1), (12, 12, 10)],
)
def test_a_small_round_is_modelled_as_well(enqueued, total, expected):
    assert startup_trials(enqueued=enqueued, total=total) == expected


@pytest.mark.parametrize(
    ("name", "too_few", "enough"), [("adam_beta1", 9, 10), ("adam_epsilon", 24, 25), ("adam_beta2", 99, 100)]
)
def test_adams_names_by_number_of_trials(name, too_few, enough):
    space = {"learning_rate": Range(1e-5, 1e-3, log=True), name: Choices((0.5, 0.9))}
    (finding,) = search_findings(space, too_few)
    assert name in finding.message
    assert not list(search_findings(space, enough))
    assert not list(search_findings({name: Fixed(0.9)}, too_few))
