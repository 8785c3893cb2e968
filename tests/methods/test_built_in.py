"""Every built-in description passes its kind's contract."""

from typing import Any, get_args, get_type_hints

import pytest
from peft import LoraConfig

from tests.contracts.methods import OptimizerContract, ScheduleContract, VariantContract
from tuner.config.wording import VALUES
from tuner.methods.optimizers import Optimizer, optimizer
from tuner.methods.registry import BUILT_IN
from tuner.methods.schedules import Schedule, schedule
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.variants import Variant, possible_variants, variant
from tuner.methods.variants.initialisations import INITIALISATIONS, REFUSED
from tuner.records import Choices, Dimension, Fixed


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


def test_every_initialisation_of_peft_is_offered_or_refused_with_a_reason() -> None:
    """Those that its type names, and LoRA-GA, which it reads beside them."""
    [names] = [
        get_args(form) for form in get_args(get_type_hints(LoraConfig)["init_lora_weights"]) if get_args(form)
    ]
    theirs = {name.partition("_niter_")[0] for name in names} | {"lora_ga"}
    offered = {each.peft for each in INITIALISATIONS.values() if isinstance(each.peft, str)}
    assert theirs == offered | set(REFUSED)
    assert not offered & set(REFUSED)


@pytest.mark.parametrize(
    ("dimension", "names"),
    [
        (None, ["lora"]),
        (Fixed(False), ["lora"]),
        (Fixed(True), ["dora"]),
        (Choices((True, False)), ["lora", "dora"]),
    ],
)
def test_possible_variants(dimension: Dimension | None, names: list[str]) -> None:
    space: dict[str, Any] = {"lora_r": Fixed(4), **({} if dimension is None else {"use_dora": dimension})}
    assert [each.name for each in possible_variants(space)] == names


def test_a_row_that_several_declare_is_one_row_with_all_of_them_as_its_condition() -> None:
    assert HYPERPARAMETERS["adam_beta1"].only_with == ("optimizer", ("adamw", "adamw_8bit"))
    assert HYPERPARAMETERS["weight_decay"].only_with == ("optimizer", BUILT_IN["optimizer"])
    assert HYPERPARAMETERS["decay_steps"].only_with == ("schedule", ("linear",))
    assert HYPERPARAMETERS["learning_rate"].only_with is None


def test_no_two_methods_have_an_alias_in_common_nor_a_name_as_one() -> None:
    typed = [word for alias in VALUES for word in alias.typed.split()]
    assert len(typed) == len(set(typed))
    assert not set(typed) & {*BUILT_IN["optimizer"], *BUILT_IN["schedule"]}
