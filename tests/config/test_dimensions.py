import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.rounds import mistake_in, spec_of, with_hyperparameters
from tests.config.strategies import dimensions
from tuner.config import HYPERPARAMETERS, dimension_to_yaml
from tuner.config.dimensions import advice_on, complete_space, read_dimension
from tuner.config.yaml_text import one_line, parse
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Anything, Integer, Number
from tuner.records import Choices, Fixed, Range, TimesSqrtRank

NAMED_DIMENSIONS = st.sampled_from(list(HYPERPARAMETERS)).flatmap(
    lambda name: st.tuples(st.just(name), dimensions(name))
)


@settings(deadline=None)
@given(NAMED_DIMENSIONS)
def test_a_dimension_survives_the_file(named):
    name, dimension = named
    text = f"value: {one_line(dimension_to_yaml(dimension))}"
    assert read_dimension(HYPERPARAMETERS[name], parse(text).document["value"]) == dimension


@pytest.mark.parametrize(
    ("written", "dimension"),
    [
        ("[[q_proj, v_proj]]", Fixed(("q_proj", "v_proj"))),
        ("[q_proj, v_proj]", Choices(("q_proj", "v_proj"))),
        ("[[q_proj], [v_proj]]", Choices((("q_proj",), ("v_proj",)))),
        ("[q_proj]", Choices(("q_proj",))),
    ],
)
def test_lists_of_a_name_that_tuner_does_not_know(written, dimension):
    of_a_command = Hyperparameter("extra.layers", None, Anything(), "")
    assert read_dimension(of_a_command, parse(f"value: {written}").document["value"]) == dimension
    assert one_line(dimension_to_yaml(dimension, of_a_command.kind)) == written


@pytest.mark.parametrize(
    ("name", "written", "dimension"),
    [
        ("learning_rate", "3e-4", Fixed(3e-4)),
        ("learning_rate", "1", Fixed(1.0)),
        ("learning_rate", "[1e-4, 3e-4]", Choices((1e-4, 3e-4))),
        ("learning_rate", "{low: 1e-5, high: 3e-3, log: true}", Range(1e-5, 3e-3, log=True)),
        ("lora_r", "{low: 4, high: 64, log: true}", Range(4, 64, log=True, integer=True)),
        ("lora_r", "{low: 4, high: 64, integer: true}", Range(4, 64, integer=True)),
        ("lora_alpha", "{low: 8, high: 64, integer: true}", Range(8, 64, integer=True)),
        ("lora_alpha", "{low: 8, high: 64}", Range(8.0, 64.0)),
        ("lora_alpha", "{times_sqrt_r: 4}", TimesSqrtRank(4.0)),
        ("target_modules", "all-linear", Fixed("all-linear")),
        ("target_modules", "[q_proj, v_proj]", Fixed(("q_proj", "v_proj"))),
        ("target_modules", "[all-linear]", Choices(("all-linear",))),
        ("target_modules", "[[q_proj, v_proj]]", Choices((("q_proj", "v_proj"),))),
        ("target_modules", "[all-linear, [q_proj]]", Choices(("all-linear", ("q_proj",)))),
        ("target_modules", r"'.*\.(q|v)_proj'", Fixed(r".*\.(q|v)_proj")),
        ("target_modules", "[all-linear, '.*q_proj']", Choices(("all-linear", ".*q_proj"))),
        ("target_modules", "['.*q_proj', [v_proj]]", Choices((".*q_proj", ("v_proj",)))),
        ("layers_to_transform", "all", Fixed("all")),
        ("layers_to_transform", "[2, 0, 1]", Fixed((0, 1, 2))),
        ("layers_to_transform", "[all, [0, 1]]", Choices(("all", (0, 1)))),
        ("lora_init", "[gaussian, orthogonal]", Choices(("gaussian", "orthogonal"))),
        ("lora_init", "[default, eva]", Choices(("default", "eva"))),
        ("variant", "[lora, my_variants:OWN]", Choices(("lora", "my_variants:OWN"))),
        ("use_dora", "[true, false]", Choices((True, False))),
        ("schedule", "[linear, cosine]", Choices(("linear", "cosine"))),
        ("lora_dropout", "0", Fixed(0.0)),
    ],
)
def test_forms_of_the_file(name, written, dimension):
    read = spec_of(with_hyperparameters(**{name: written})).space()[name]
    assert read == dimension
    if isinstance(dimension, Fixed):
        assert type(read.value) is type(dimension.value)


def test_an_integer_range_has_integer_bounds():
    dimension = read_dimension(HYPERPARAMETERS["lora_r"], {"low": 4, "high": 64})
    assert type(dimension.low) is int
    assert dimension_to_yaml(dimension) == {"low": 4, "high": 64, "integer": True}


def test_whole_numbers_are_written_as_people_type_them():
    assert one_line(dimension_to_yaml(Fixed(16.0))) == "16"
    assert one_line(dimension_to_yaml(Choices((8.0, 16.5)))) == "[8, 16.5]"


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("learning_rate", '"1e-5"', "expects a number above 0, got '1e-5'; that is text, write 1e-5 without"),
        ("learning_rate", "fast", "expects a number above 0, got 'fast'"),
        ("learning_rate", "0", "expects a number above 0, got 0"),
        ("learning_rate", "-1e-4", "expects a number above 0, got -0.0001"),
        ("learning_rate", ".inf", "expects a number above 0, got inf"),
        ("learning_rate", "true", "expects a number above 0, got true"),
        ("learning_rate", "", "expects a number above 0, but it has no value"),
        ("learning_rate", "[]", "is an empty list"),
        ("learning_rate", "[1e-4, 0.0001]", "lists 0.0001 twice"),
        ("learning_rate", "[1e-4, x]", "expects a number above 0, got 'x'"),
        ("learning_rate", "{low: 1e-5}", "the range lacks high"),
        ("learning_rate", "{}", "the range lacks low and high"),
        ("learning_rate", "{low: 0, high: 1}", "low expects a number above 0, got 0"),
        ("learning_rate", "{low: 1e-3, high: 1e-5}", "low < high"),
        ("learning_rate", "{low: 1e-5, high: 1e-3, log: yes}", "log expects true or false, got 'yes'"),
        ("learning_rate", "{low: 1e-5, high: 1e-3, lgo: true}", "'lgo' is unknown in a range"),
        ("learning_rate", "{low: 1e-5, high: 1e-3, step: 1e-4}", "list the values"),
        ("learning_rate", "{times_sqrt_r: 4}", "allowed only for lora_alpha"),
        ("weight_decay", "{low: 0, high: 0.1, log: true}", "a logarithmic range needs low > 0"),
        ("lora_alpha", "{low: 0.5, high: 4, integer: true}", "low expects a whole number, got 0.5"),
        ("lora_alpha", "{times_sqrt_r: -1}", "times_sqrt_r expects a number above 0"),
        ("lora_alpha", "{times_sqrt_r: 4, low: 1}", "no other keys"),
        ("lora_r", "0", "expects a whole number of at least 1, got 0"),
        ("lora_r", "8.0", "expects a whole number of at least 1, got 8.0; write 8"),
        ("lora_r", '"8"', "write 8 without quotes"),
        ("lora_r", "{low: 4, high: 64, integer: false}", "whole numbers only"),
        ("lora_r", "{low: 4, high: 8.5}", "high expects a whole number"),
        ("lora_dropout", "1", "at least 0 and below 1"),
        ("lora_dropout", "-0.1", "at least 0 and below 1"),
        ("adam_beta2", "1.0", "at least 0 and below 1"),
        ("warmup_steps", "-1", "a whole number of at least 0"),
        ("training_seed", "-1", "a whole number of at least 0"),
        ("use_dora", "yes", "expects true or false, got 'yes'"),
        ("use_dora", "1", "expects true or false, got 1"),
        (
            "optimizer",
            "sgd",
            "expects adamw, adamw_8bit, lion, lion_8bit, muon or package.module:Name, got 'sgd'",
        ),
        ("optimizer", "paged_adamw_8bit", "did you mean adamw_8bit?"),
        ("optimizer", "{low: 1, high: 2}", "cannot be a range"),
        ("schedule", "wsd", "did you mean linear?"),
        ("schedule", "cosin", "did you mean cosine?"),
        (
            "lora_init",
            "[default, loftq]",
            "default, gaussian, orthogonal or eva, got 'loftq'; it changes",
        ),
        ("variant", "dora", "expects lora or package.module:Name, got 'dora'; write use_dora: true"),
        ("variant", "loha", "expects lora or package.module:Name"),
        ("lora_init", "pissa_niter_16", "it changes the frozen base model's weights, which all trials share"),
        ("lora_init", "olora", "it changes the frozen base model's weights"),
        ("lora_init", "corda", "it changes the frozen base model's weights"),
        ("lora_init", "lora_ga", "it changes the frozen base model's weights"),
        ("lora_init", "mica", "trains only A"),
        ("lora_init", "gausian", "did you mean gaussian?"),
        ("layers_to_transform", "3", "write a single layer as [3]"),
        ("layers_to_transform", "[0, -1]", "expects layer numbers from 0 in a list, got -1"),
        ("layers_to_transform", "[0, true]", "expects layer numbers from 0 in a list, got true"),
        ("layers_to_transform", "[1, 1]", "lists a layer twice"),
        ("layers_to_transform", "[]", "expects all or a list of layer numbers"),
        ("layers_to_transform", "{low: 0, high: 3}", "cannot be a range"),
        ("target_modules", "'(q_proj'", "which is not a valid regular expression: missing )"),
        ("target_modules", "['.*q_proj', v_proj]", "write a single layer as [v_proj]"),
        ("target_modules", "[['.*q_proj']]", "write a regular expression as text"),
        ("target_modules", "q_proj", "write a single layer as [q_proj]"),
        ("target_modules", "[all-linear, q_proj]", "write a single layer as [q_proj]"),
        ("target_modules", "[q_proj, q_proj]", "lists a layer twice"),
        ("target_modules", "[q_proj, 3]", "expects layer names in a list, got 3"),
        ("target_modules", "[[q_proj, all-linear]]", "expects layer names in a list, got 'all-linear'"),
        ("target_modules", "[]", "all-linear, a list of layer names"),
    ],
)
def test_refused_values(name, written, message):
    mistake = mistake_in(with_hyperparameters(**{name: written}))
    assert mistake.key == f"hyperparameters.{name}"
    assert mistake.line == 7
    assert message in mistake.message


_AS_RANGE = "write the values as a list, [1e-4, 1e-2], or a range, {low: 1e-4, high: 1e-2, log: true}"
_HOW = "write the values as a list, [A, B], or a range, {low: A, high: B}, with log: true"


@pytest.mark.parametrize(
    ("name", "written", "how"),
    [
        *(
            ("learning_rate", text, _AS_RANGE)
            for text in (
                "1e-4..1e-2",
                "1e-4-1e-2",
                "1e-4 to 1e-2",
                "1e-4:1e-2:log",
                "(1e-4, 1e-2)",
                '"low: 1e-4, high: 1e-2"',
                "loguniform(1e-4, 1e-2)",
                "[1e-4..1e-2]",
            )
        ),
        ("learning_rate", "[[1e-4, 1e-2]]", "or a range, {low: 0.0001, high: 0.01, log: true}"),
        ("learning_rate", "{min: 1e-4, max: 1e-2}", "or a range, {low: 0.0001, high: 0.01, log: true}"),
        ("learning_rate", "fast", _HOW),
        ("learning_rate", "", _HOW),
        ("learning_rate", "1e-2..1e-4", "{low: A, high: B}"),
        ("lora_r", "8, 16, 32", "a list, [8, 16, 32], or a range"),
        ("lora_r", "8.5..16.5", _HOW),
        ("lora_dropout", "0..0.1", "{low: 0, high: 0.1}"),
        ("lora_dropout", "0-.1", "{low: 0, high: .1}"),
        ("schedule", "linear, cosine", "to search them, write a list: [linear, cosine]"),
        ("use_dora", "true/false", ""),
        ("warmup_steps", "0.1", "it is a number of optimizer steps, not a share of the run"),
        ("decay_steps", "40%", "it is a number of optimizer steps, not a share of the run"),
        ("target_modules", "all", "did you mean all-linear?"),
        ("target_modules", "q_proj, v_proj", "write the layers as [q_proj, v_proj]"),
    ],
)
def test_what_looks_like_several_values_is_answered_with_how_they_are_written(name, written, how):
    message = mistake_in(with_hyperparameters(**{name: written})).message
    assert message.endswith(how) or how in message
    assert "log: true}" not in message or how.endswith("log: true}")


def test_every_searched_number_is_answered_with_a_range():
    numbers = [row.name for row in HYPERPARAMETERS.values() if isinstance(row.kind, (Number, Integer))]
    assert len(numbers) > 10
    for name in numbers:
        message = advice_on(HYPERPARAMETERS[name], "a lot")
        assert message.startswith(f"; to search, {_HOW}")


@pytest.mark.parametrize("written", ["-1", '"1e-5"', "{low: 1e-3, high: 1e-5}", "[1e-4, 1e-4]", "true"])
def test_one_wrong_value_is_not_answered_with_a_range(written):
    assert "to search" not in mistake_in(with_hyperparameters(learning_rate=written)).message


@pytest.mark.parametrize(
    ("written", "notes"),
    [
        (
            "[1e-5, 1e-3]",
            ["is a list: only 1e-05 and 0.001 are tried. To search between them, write {low: 1e-05"],
        ),
        ("[1e-5, 2e-5]", []),
        ("[1e-5, 1e-4, 1e-3]", []),
        ("{low: 1e-5, high: 1e-3}", []),
    ],
)
def test_a_list_of_two_far_apart_is_remarked_on(written, notes):
    said = list(spec_of(with_hyperparameters(learning_rate=written)).doubtful_values())
    assert len(said) == len(notes)
    assert all(note in found for note, found in zip(notes, said, strict=True))


@settings(deadline=None)
@given(st.integers(1, 10**5), st.integers(0, 10**5) | st.none(), st.integers(0, 10**5) | st.none())
def test_default_lengths_fit_whatever_the_horizon(horizon, warmup, decay):
    given_lengths = {"warmup_steps": warmup, "decay_steps": decay}
    written = {name: steps for name, steps in given_lengths.items() if steps is not None and steps <= horizon}
    space = complete_space(written, max_train_steps=horizon)
    assert list(space)[: len(written)] == list(written)
    chosen = {"optimizer": "adamw_8bit", "schedule": "linear"}
    rows = HYPERPARAMETERS.values()
    counting = {r.name for r in rows if r.only_with is None or chosen[r.only_with[0]] in r.only_with.values}
    unwritten = {r.name for r in rows if r.only_if_written}
    assert set(space) == counting - unwritten
    assert space["warmup_steps"].value >= 0
    assert space["decay_steps"].value >= 0
    if len(written) < 2:
        assert space["warmup_steps"].value + space["decay_steps"].value <= horizon


@pytest.mark.parametrize(
    ("horizon", "written", "warmup", "decay"),
    [
        (60, {}, 5, 24),
        (1000, {}, 5, 400),
        (1, {}, 0, 0),
        (5, {}, 2, 2),
        (60, {"warmup_steps": 50}, 50, 10),
        (60, {"warmup_steps": [5, 50]}, None, 10),
        (60, {"decay_steps": 58}, 1, 58),
        (60, {"decay_steps": {"low": 10, "high": 60}}, 0, None),
    ],
)
def test_default_lengths(horizon, written, warmup, decay):
    space = complete_space(written, max_train_steps=horizon)
    assert warmup is None or space["warmup_steps"] == Fixed(warmup)
    assert decay is None or space["decay_steps"] == Fixed(decay)


def test_every_default_is_a_value_its_kind_accepts():
    for row in HYPERPARAMETERS.values():
        if row.default is not None:
            assert row.kind.parse(row.default) == row.default
            assert type(row.kind.parse(row.default)) is type(row.default)
