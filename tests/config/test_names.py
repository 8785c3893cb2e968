import pytest

from tests.config.rounds import MINIMAL, mistake_in, mistakes_in, with_hyperparameters
from tuner.config import HYPERPARAMETERS
from tuner.config.parsing import _KNOWN_KEYS
from tuner.config.wording import KEYS, NOT_KEYS, VALUES


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lora_rank", "lora_r"),
        ("r", "lora_r"),
        ("rank", "lora_r"),
        ("alpha", "lora_alpha"),
        ("lr", "learning_rate"),
        ("LR", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("lerning_rate", "learning_rate"),
        ("lora_rnk", "lora_r"),
        ("per_device_train_batch_size", "batch_size"),
        ("micro_batch_size", "batch_size"),
        ("gradient_accumulation_steps", "batch_size"),
        ("lr_scheduler_type", "schedule"),
        ("warmup_ratio", "warmup_steps"),
        ("warmup", "warmup_steps"),
        ("dropout", "lora_dropout"),
        ("seed", "training_seed"),
        ("optim", "optimizer"),
        ("init_lora_weights", "lora_init"),
        ("loraplus_lr_ratio", "loraplus_ratio"),
        ("eps", "adam_epsilon"),
        ("beta1", "adam_beta1"),
    ],
)
def test_what_people_type_for_hyperparameters(typed, meant):
    message = mistake_in(with_hyperparameters(**{typed: "1"})).message
    assert message.startswith(f"unknown; did you mean {meant}?")


def test_names_that_change_the_value_too_say_so():
    batch = mistake_in(with_hyperparameters(per_device_train_batch_size="2")).message
    assert "sequences per optimizer step" in batch
    assert "micro-batches is automatic" in batch
    assert "not a share" in mistake_in(with_hyperparameters(warmup_ratio="0.1")).message
    assert "epochs x training rows / batch_size" in mistake_in(f"{MINIMAL}num_train_epochs: 3\n").message


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("num_train_steps: 60", "num_train_steps", "did you mean max_train_steps?"),
        ("lora_rank: 8", "lora_rank", "did you mean hyperparameters.lora_r?"),
        ("lora_r: 8", "lora_r", "unknown here; lora_r belongs under hyperparameters"),
        ("trials: 8", "trials", "belongs under search"),
        ("every_steps: 8", "every_steps", "belongs under evaluation"),
        ("batch_size: 8", "batch_size", "belongs under hyperparameters or under evaluation"),
        ("seed: 8", "seed", "belongs under search. Or did you mean hyperparameters.training_seed?"),
        ("n_trials: 8", "n_trials", "did you mean search.trials?"),
        ("eval_steps: 8", "eval_steps", "did you mean evaluation.every_steps?"),
        ("storge: x", "storge", "did you mean storage?"),
        ("evaluation: {eval_steps: 5}", "evaluation.eval_steps", "did you mean every_steps?"),
        ("evaluation: {storage: x}", "evaluation.storage", "belongs at the top level of the file"),
        ("evaluation: {lr: 5}", "evaluation.lr", "did you mean hyperparameters.learning_rate?"),
        (
            "search: {zzz: 5}",
            "search.zzz",
            "unknown; allowed here: trials, sampler, sampler_arguments, seed, enqueue",
        ),
        ("run: {save_steps: 5}", "run.save_steps", "not needed: tuner saves"),
        ("search: {enqueue: [{zzz: 5}]}", "search.enqueue[0].zzz", "training_seed, continues"),
        ("search: {enqueue: [{trials: 5}]}", "search.enqueue[0].trials", "belongs under search"),
    ],
)
def test_names_in_the_wrong_place(text, key, message):
    mistake = mistake_in(f"{MINIMAL}{text}\n")
    assert mistake.key == key
    assert message in mistake.message


def test_the_horizon_is_never_searched():
    rule = "All trials of a round train for the same number of steps"
    ranged = mistake_in(MINIMAL.replace("max_train_steps: 60", "max_train_steps: {low: 30, high: 60}"))
    listed = mistake_in(MINIMAL.replace("max_train_steps: 60", "max_train_steps: [30, 60]"))
    among = mistake_in(with_hyperparameters(max_train_steps="[30, 60]"))
    alias = mistake_in(with_hyperparameters(max_steps="30"))
    queued = mistake_in(f"{MINIMAL}search: {{enqueue: [{{max_train_steps: 30}}]}}\n")
    for mistake in (ranged, listed, among, alias, queued):
        assert rule in mistake.message
        assert "Deep Learning Tuning Playbook" in mistake.message
    assert "got [30, 60]" in listed.message
    assert among.message.startswith("not a hyperparameter")
    assert alias.message.startswith("unknown; did you mean max_train_steps, at the top level of the file?")
    assert (ranged.line, among.line) == (5, 7)


def test_every_alias_leads_to_a_key_and_is_no_key_itself():
    assert {alias.meant for alias in KEYS} <= set(_KNOWN_KEYS)
    assert set(HYPERPARAMETERS) <= {key.removeprefix("hyperparameters.") for key in _KNOWN_KEYS}
    typed = [word for alias in (*KEYS, *NOT_KEYS) for word in alias.typed.split()]
    assert len(typed) == len(set(typed))
    places = {key for key in _KNOWN_KEYS if "." in key}
    for alias in KEYS:
        section = alias.meant.rpartition(".")[0]
        for word in alias.typed.split():
            assert f"{section}.{word}".removeprefix(".") not in {*places, *_KNOWN_KEYS}, word
    values = [word for alias in VALUES for word in alias.typed.split()]
    assert len(values) == len(set(values))


def test_two_unknown_keys_are_two_mistakes():
    assert [mistake.key for mistake in mistakes_in(f"{MINIMAL}foo: 1\nbar: 2\n")] == ["foo", "bar"]
