from pathlib import Path

import pytest

from tests.config.rounds import FULL, MINIMAL, mistake_in, mistakes_in, spec_of, with_hyperparameters
from tests.studies import round_file
from tuner.config.parsing import read_round
from tuner.errors import InputError, RoundFileError
from tuner.records import num_points


def changed(*pairs: tuple[str, str]) -> str:
    text = FULL
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


ENQUEUE = "enqueue: []"
TOO_LONG = "decay_steps: 56"


@pytest.mark.parametrize(
    ("pairs", "line", "key", "message"),
    [
        ([("decay_steps: 24", TOO_LONG)], 21, "hyperparameters.decay_steps", "(5) + decay_steps (56) = 61"),
        ([("decay_steps: 24", "decay_steps: [24, 56]")], 21, "hyperparameters.decay_steps", "= 61"),
        ([("_steps: 24", "_steps: {low: 24, high: 56}")], 21, "hyperparameters.decay_steps", "= 61"),
        ([("warmup_steps: 5", "warmup_steps: 40")], 21, "hyperparameters.decay_steps", "= 64"),
        (
            [("schedule: linear", "schedule: [cosine, linear]"), ("decay_steps: 24", TOO_LONG)],
            21,
            "hyperparameters.decay_steps",
            "= 61",
        ),
        ([("warmup_steps: 5", "warmup_steps: 61")], 19, "hyperparameters.warmup_steps", "61 is above max_tr"),
        (
            [("every_steps: 5", "every_steps: 61")],
            27,
            "evaluation.every_steps",
            "61 is above max_train_steps",
        ),
        ([("_steps: 2000", "_steps: 59")], 29, "run.production_steps", "59 is below max_train_steps (60)"),
        (
            [("every_steps: 5", "every_steps: 5, answers: {objective: true}"), ("r: none", "r: median")],
            29,
            "run.pruner",
            "median compares losses during training",
        ),
        (
            [("every_steps: 5", "every_steps: 5, answers: {objective: true}"), ("e: local", "e: simulated")],
            27,
            "evaluation.answers.objective",
            "a dry run trains no model",
        ),
        (
            [("every_steps: 5", "every_steps: 5, answers: {metric: exact}")],
            27,
            "evaluation.answers.metric",
            "expects exact_match, file.py:function or module:function, got 'exact'",
        ),
        ([("quasi-random", "grid")], 13, "hyperparameters.learning_rate", "the grid sampler requires lists"),
        ([(ENQUEUE, "enqueue: [{lora_r: 12}]")], 26, "search.enqueue[0].lora_r", "allowed: 8, 16 or 32"),
        (
            [(ENQUEUE, "enqueue: [{learning_rate: 1e-2}]")],
            26,
            "search.enqueue[0].learning_rate",
            "0.01 is not in the search space; allowed: from 1e-05 to 0.003",
        ),
        ([(ENQUEUE, "enqueue: [{lora_alpha: 32}]")], 26, "search.enqueue[0].lora_alpha", "alpha: [16, 32]"),
        ([(ENQUEUE, "enqueue: [{use_dora: true}]")], 26, "search.enqueue[0].use_dora", "dora: [false, true]"),
        (
            [(ENQUEUE, "enqueue: [{}, {target_modules: [q]}]")],
            26,
            "search.enqueue[1].target_modules",
            "only 'all-linear'",
        ),
        ([(ENQUEUE, "enqueue: [{continues: round1/3}]")], 26, "search.enqueue[0].continues", "of this round"),
        (
            [("lora_alpha: 16", "lora_alpha: {times_sqrt_r: 4}"), (ENQUEUE, "enqueue: [{lora_alpha: 16}]")],
            26,
            "search.enqueue[0].lora_alpha",
            "depends on the rank",
        ),
        (
            [("trials: 16", "trials: 1"), (ENQUEUE, "enqueue: [{}, {}]")],
            26,
            "search.enqueue",
            "has 2 entries",
        ),
        (
            [("lora_alpha: 16", "lora_init: [default, orthogonal]"), ("[8, 16, 32]", "[8, 15]")],
            15,
            "hyperparameters.lora_init",
            "orthogonal requires even ranks, but lora_r can be 15",
        ),
        (
            [("lora_alpha: 16", "lora_init: orthogonal"), ("[8, 16, 32]", "{low: 8, high: 16}")],
            15,
            "hyperparameters.lora_init",
            "lora_r can be 9",
        ),
        (
            [("lora_alpha: 16", "layers_to_transform: [0]"), ("all-linear", "[all-linear, '.*q_proj']")],
            15,
            "hyperparameters.layers_to_transform",
            "can be the regular expression '.*q_proj'",
        ),
        (
            [(ENQUEUE, "enqueue: [{layers_to_transform: [0]}]")],
            26,
            "search.enqueue[0].layers_to_transform",
            "[0] is not in the search space, only 'all'; to try both, write hyper",
        ),
        ([("  eval:  [{path: data/eval.jsonl, format: alpaca}]\n", "")], 5, "data.eval", "fraction: 0.05"),
        ([("512", "512\n  eval_fraction: 0.1")], 10, "data.eval_fraction", "combined with eval"),
    ],
)
def test_conflicts(pairs, line, key, message):
    mistake = mistake_in(changed(*pairs))
    assert (mistake.line, mistake.key) == (line, key)
    assert message in mistake.message


@pytest.mark.parametrize(
    "pairs",
    [
        [("lora_alpha: 16", "lora_init: orthogonal")],
        [("lora_alpha: 16", "layers_to_transform: all"), ("all-linear", "'.*q_proj'")],
        [(ENQUEUE, "enqueue: [{layers_to_transform: all}]")],
        [("decay_steps: 24", "decay_steps: 55")],
        [("schedule: linear", "schedule: constant"), ("decay_steps: 24", "decay_steps: 60")],
        [("schedule: linear", "schedule: [constant, cosine]"), ("warmup_steps: 5", "warmup_steps: 60")],
        [("every_steps: 5", "every_steps: 60")],
        [("production_steps: 2000", "production_steps: 60")],
        [("production_steps: 2000", "production_steps: null")],
        [("sampler: quasi-random", "sampler: grid"), ("{low: 1e-5, high: 3e-3, log: true}", "[1e-4, 3e-4]")],
        [
            (
                "enqueue: []",
                "enqueue: [{learning_rate: 1e-5, lora_r: 32, lora_alpha: 16, continues: round0/3}]",
            )
        ],
        [("enqueue: []", "enqueue: [{learning_rate: 3e-3, target_modules: all-linear}]")],
        [("trials: 16", "trials: 2"), ("enqueue: []", "enqueue: [{}, {}]")],
        [("  eval:  [{path: data/eval.jsonl, format: alpaca}]\n", "  eval_fraction: 0.1\n")],
    ],
)
def test_what_just_fits(pairs):
    assert spec_of(changed(*pairs)).round == "round1"


def test_a_point_is_not_blamed_for_a_dimension_that_is_wrong():
    text = changed(("lora_r: [8, 16, 32]", "lora_r: [8, 8]"), (ENQUEUE, "enqueue: [{lora_r: 12}]"))
    assert mistake_in(text).key == "hyperparameters.lora_r"


def test_only_warmup_in_the_file_is_blamed_for_what_it_causes():
    mistake = mistake_in(with_hyperparameters(warmup_steps="[5, 61]"))
    assert mistake.key == "hyperparameters.warmup_steps"
    spec_of(with_hyperparameters(warmup_steps="[5, 60]"))


def test_decay_longer_than_the_horizon_is_blamed_without_warmup_in_the_file():
    mistake = mistake_in(with_hyperparameters(decay_steps="61"))
    assert mistake.key == "hyperparameters.decay_steps"
    assert "warmup_steps (0) + decay_steps (61)" in mistake.message


def test_a_grid_names_every_range():
    text = with_hyperparameters(
        learning_rate="{low: 1e-5, high: 1e-3}", lora_r="{low: 4, high: 8}", lora_alpha="[8, 16]"
    )
    keys = [mistake.key for mistake in mistakes_in(f"{text}search: {{sampler: grid}}\n")]
    assert keys == ["hyperparameters.learning_rate", "hyperparameters.lora_r"]


def test_enqueued_values_are_read_like_those_of_the_space():
    text = f"{MINIMAL}search: {{enqueue: [{{lora_alpha: 16, target_modules: all-linear}}]}}\n"
    entry = spec_of(text).search.enqueue[0]
    assert entry == {"lora_alpha": 16.0, "target_modules": "all-linear"}
    assert type(entry["lora_alpha"]) is float


SEARCHED = """
hyperparameters:
  learning_rate: [1e-4, 1e-3]
  lora_r: [8, 16]
  target_modules: all-linear
  training_seed: {seeds}
search:
  trials: 8
  enqueue: {entries}
"""


def of_entries(entries: str, *, seeds: str = "0") -> str:
    return MINIMAL + SEARCHED.format(entries=entries, seeds=seeds)


@pytest.mark.parametrize(
    ("entries", "refused", "message"),
    [
        (
            "[{learning_rate: 1e-4, lora_r: 8}, {lora_r: 8, learning_rate: 0.0001}]",
            [1],
            "is the same point as search.enqueue[0] (learning_rate: 0.0001, lora_r: 8)",
        ),
        ("3 * [{learning_rate: 1e-4, lora_r: 8}]", [1, 2], "remove one of them, or list two values"),
        (
            "[{lora_r: 8, learning_rate: 1e-4}, {lora_r: 8, learning_rate: 1e-4, continues: r0/3}]",
            [1],
            "is the same point",
        ),
        (
            "[{lora_r: 8, learning_rate: 1e-4}, "
            "{learning_rate: 1e-4, lora_r: 8, target_modules: all-linear}]",
            [1],
            "is the same point",
        ),
        (
            "[{lora_r: 8, learning_rate: 1e-4}, {lora_r: 8}, {}, {lora_r: 8}]",
            [3],
            "is one of 3 entries with lora_r: 8, and the search space has only 2 points with lora_r: 8",
        ),
        ("5 * [{}]", [4], "is one of 5 entries, and the search space has only 4 points; remove 1 of them"),
        (
            "[{lora_r: 8}, {lora_r: 8}, {lora_r: 16}, {lora_r: 16}, {learning_rate: 1e-4}]",
            [4],
            "the search space has only 4 points; remove 1 of them, or search more values",
        ),
    ],
)
def test_an_entry_that_repeats_a_point_is_refused(entries, refused, message):
    times, _, entry = entries.rpartition(" * ")
    text = of_entries("[" + ", ".join(int(times) * [entry[1:-1]]) + "]" if times else entries)
    mistakes = mistakes_in(text)
    assert [mistake.key for mistake in mistakes] == [f"search.enqueue[{position}]" for position in refused]
    assert message in mistakes[0].message
    line = 1 + text[: text.index("  enqueue:")].count("\n")
    assert {mistake.line for mistake in mistakes} == {line}


@pytest.mark.parametrize(
    ("entries", "seeds"),
    [
        ("[{lora_r: 8}, {lora_r: 8}, {lora_r: 16}, {}]", "0"),
        ("[{lora_r: 8, learning_rate: 1e-4}, {lora_r: 8, learning_rate: 1e-3}]", "0"),
        ("[{lora_r: 8, learning_rate: 1e-4}, {lora_r: 8, learning_rate: 1e-4}]", "[0, 1]"),
        (
            "[{lora_r: 8, learning_rate: 1e-4, training_seed: 0}, "
            "{lora_r: 8, learning_rate: 1e-4, training_seed: 1}]",
            "[0, 1]",
        ),
    ],
)
def test_entries_that_leave_each_other_room(entries, seeds):
    assert spec_of(of_entries(entries, seeds=seeds)).search.enqueue


def test_entries_of_a_range_may_be_as_many_as_there_are_trials():
    queue = "enqueue: [" + ", ".join(16 * ["{lora_r: 8}"]) + "]"
    assert len(spec_of(changed((ENQUEUE, queue))).search.enqueue) == 16


@pytest.mark.parametrize(
    ("optimizer", "name", "message"),
    [
        (
            "lion",
            "adam_beta1",
            "applies only to optimizer: adamw or adamw_8bit; optimizer is 'lion' here, whose own "
            "hyperparameters are weight_decay, lion_beta1, lion_beta2",
        ),
        ("[lion, muon]", "adam_epsilon", "optimizer is 'lion' or 'muon' here"),
        (
            "adamw",
            "lion_beta1",
            "applies only to optimizer: lion or lion_8bit; optimizer is 'adamw'",
        ),
    ],
)
def test_what_no_trial_would_have_is_refused_at_its_line(optimizer, name, message):
    mistake = mistake_in(with_hyperparameters(optimizer=optimizer, **{name: "0.5"}))
    assert (mistake.key, mistake.line) == (f"hyperparameters.{name}", 8)
    assert message in mistake.message


def test_what_some_trial_has_is_searched():
    written = with_hyperparameters(
        optimizer="[adamw, lion]", adam_beta1="[0.8, 0.9]", lion_beta1="[0.9, 0.95]"
    )
    space = spec_of(written).space()
    assert space["adam_beta1"].only_with == ("optimizer", ("adamw", "adamw_8bit"))
    assert num_points(space) == 2 + 2
    assert "muon_rate" not in space
    assert "adam_epsilon" in space


def test_a_wrong_optimizer_is_the_only_mistake():
    mistake = mistake_in(with_hyperparameters(optimizer="lyon", lion_beta1="0.9"))
    assert mistake.key == "hyperparameters.optimizer"
    assert "did you mean lion?" in mistake.message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{optimizer: lion, adam_beta1: 0.8}", "adamw_8bit; this entry has optimizer: lion"),
        ("{adam_beta1: 0.8}", "add optimizer to this entry"),
        ("{optimizer: adamw, adam_beta1: 0.8}", None),
    ],
)
def test_an_entry_names_what_counts_with_its_optimizer(entry, message):
    text = with_hyperparameters(optimizer="[adamw, lion]", adam_beta1="[0.8, 0.9]")
    text += f"search: {{enqueue: [{entry}]}}\n"
    if message is None:
        assert spec_of(text).search.enqueue
    else:
        mistake = mistake_in(text)
        assert mistake.key == "search.enqueue[0].adam_beta1"
        assert message in mistake.message


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_decay_steps_beside_another_schedule_are_let_pass_and_in_no_trial(schedule):
    spec = spec_of(with_hyperparameters(schedule=schedule, decay_steps="20"))
    assert "decay_steps" not in spec.space()


@pytest.mark.parametrize(
    ("schedule", "notes"),
    [
        ("cosine", ["hyperparameters.decay_steps has no effect: it applies only to schedule: linear"]),
        ("[linear, cosine]", []),
        ("linear", []),
    ],
)
def test_a_decay_beside_another_schedule_is_said_to_have_no_effect(
    tmp_path: Path, schedule: str, notes: list[str]
) -> None:
    found = list(round_file(tmp_path, schedule=schedule).spec.without_effect())
    assert len(found) == len(notes)
    for said, expected in zip(found, notes, strict=True):
        assert said.startswith(expected)
        assert said.endswith("remove it")


@pytest.mark.parametrize("chooser", ["optimizer", "schedule"])
def test_names_that_may_belong_to_a_method_that_is_not_installed_are_not_refused_beside_it(
    chooser: str,
) -> None:
    text = with_hyperparameters(**{chooser: "prodigy"}, prodigy_d0="0.1", lora_rank="8")
    found = [mistake.key for mistake in mistakes_in(text)]
    assert found == [f"hyperparameters.{chooser}", "hyperparameters.lora_rank"]
    alone = mistake_in(with_hyperparameters(prodigy_d0="0.1"))
    assert alone.message.startswith("unknown; allowed here: learning_rate")


def test_a_folder_with_the_name_of_a_key_is_blamed_where_it_is_written(tmp_path: Path):
    file = round_file(tmp_path)
    text = file.text.replace(str(file.spec.model.path), "search")
    named = read_round(text, file.path)
    error = named.placed(InputError("search: there is no model"))
    assert isinstance(error, RoundFileError)
    (mistake,) = error.mistakes
    assert (mistake.key, mistake.line) == ("model.path", named.line("model.path"))
    of_the_key = named.placed(InputError("storage: the URL names no file"))
    assert isinstance(of_the_key, RoundFileError)
    assert of_the_key.mistakes[0].line == named.line("storage")
