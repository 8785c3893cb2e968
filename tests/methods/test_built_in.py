"""Every built-in description passes its kind's contract."""

import pytest

from tests.contracts.methods import OptimizerContract, ScheduleContract, VariantContract
from tuner.config.names import VALUES
from tuner.methods.optimizers import Optimizer, optimizer
from tuner.methods.registry import BUILT_IN
from tuner.methods.schedules import Schedule, schedule
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.variants import Variant, variant


class TestOptimizers(OptimizerContract):
    @pytest.fixture(params=BUILT_IN["optimizer"])
    def method(self, request: pytest.FixtureRequest) -> Optimizer:
        return optimizer(request.param)


class TestSchedules(ScheduleContract):
    @pytest.fixture(params=BUILT_IN["schedule"])
    def method(self, request: pytest.FixtureRequest) -> Schedule:
        return schedule(request.param)


class TestVariants(VariantContract):
    @pytest.fixture(params=BUILT_IN["variant"])
    def method(self, request: pytest.FixtureRequest) -> Variant:
        return variant(request.param)


def test_a_row_that_several_declare_is_one_row_with_all_of_them_as_its_condition() -> None:
    assert HYPERPARAMETERS["adam_beta1"].only_with == ("optimizer", ("adamw", "adamw_8bit"))
    assert HYPERPARAMETERS["weight_decay"].only_with == ("optimizer", BUILT_IN["optimizer"])
    assert HYPERPARAMETERS["decay_steps"].only_with == ("schedule", ("linear",))
    assert HYPERPARAMETERS["learning_rate"].only_with is None


def test_no_two_methods_have_an_alias_in_common_nor_a_name_as_one() -> None:
    typed = [word for alias in VALUES for word in alias.typed.split()]
    assert len(typed) == len(set(typed))
    assert not set(typed) & {*BUILT_IN["optimizer"], *BUILT_IN["schedule"]}
