"""`trial generate`: which trial a name means, the template of training, files of prompts, wrong options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.data.tiny import write_jsonl
from tests.studies import QUICKSTART, round_file
from tests.study.simulation import adopt, simulate, trials
from tuner.cli import run
from tuner.errors import InputError
from tuner.playbook import best_evaluation
from tuner.records import Trial, TrialState
from tuner.study.folder import open_folder
from tuner.study.lookup import find_trial

BASE = QUICKSTART / "base"
INSTRUCTION = "Name a river."
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    f"request.\n\n### Instruction:\n{INSTRUCTION}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{INSTRUCTION}\n\n### Input:\nA short one.\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round that was simulated, whose trials are given an adapter of their own each."""
    directory = tmp_path_factory.mktemp("study")
    simulate(directory, trials=6)
    for trial in trials(directory):
        link = directory / "runs" / "round1" / f"trial-{trial.number:04d}" / "best"
        if trial.state == TrialState.COMPLETE:
            write_adapter(link.resolve(), seed=trial.number)
            adopt(directory, trial)
    return directory


def write_adapter(directory: Path, *, seed: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(str(directory))


def best_of(study: Path) -> Trial:
    complete = [t for t in trials(study) if t.state == TrialState.COMPLETE]
    return min(complete, key=lambda t: best_evaluation(t.evaluations).eval_loss)  # type: ignore[union-attr]


def by_transformers(prompt: str, adapter: Path | None) -> str:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=10, do_sample=False
    )
    return str(tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)).strip()


def answer(capsys: pytest.CaptureFixture[str], study: Path, name: str, *more: str) -> str:
    capsys.readouterr()
    command = ["-C", str(study), "trial", "generate", name, "--prompt", INSTRUCTION, "--max-new-tokens", "10"]
    assert run([*command, *more]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"next: tuner -C {study} trial generate {name} "), said.err
    return said.out.strip()


def test_the_prompt_goes_through_the_template_of_training(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    best = best_of(study)
    adapter = study / "runs" / "round1" / f"trial-{best.number:04d}" / "best"
    expected = by_transformers(PROMPT, adapter)
    assert expected
    assert answer(capsys, study, "best") == expected
    assert answer(capsys, study, str(best.number)) == expected
    assert answer(capsys, study, f"round1/{best.number}") == expected
    assert answer(capsys, study, "best", "--base") == by_transformers(PROMPT, None) != expected
    assert answer(capsys, study, "best", "--context", "A short one.") == by_transformers(WITH_INPUT, adapter)


def test_both_answers_side_by_side(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    trial = f"round1/{best_of(study).number}"
    with_adapter, of_base = answer(capsys, study, "best"), answer(capsys, study, "best", "--base")
    both = f"--- {trial}\n{with_adapter}\n--- base\n{of_base}"
    assert answer(capsys, study, "best", "--compare") == both
    assert answer(capsys, study, "best", "--compare", "--stream") == both


ROWS = [
    {"instruction": INSTRUCTION, "input": "", "output": "ignored"},
    {"prompt": INSTRUCTION},
    {"instruction": INSTRUCTION, "input": "A short one."},
    {"prompt": INSTRUCTION, "context": "A short one."},
    *({"prompt": f"Count to {number}: {'1 ' * number}"} for number in (9, 1, 6)),
]


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def generate_file(study: Path, questions: Path, *more: str) -> int:
    command = ["-C", str(study), "trial", "generate", "best", "--input", str(questions)]
    return run([*command, "--max-new-tokens", "10", *more])


def test_a_system_message_and_a_file_of_messages(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of alpaca rows, whose template takes the system's text instead of its own beginning."""
    monkeypatch.chdir(study)
    asked = {"role": "user", "content": INSTRUCTION}
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, asked]}, {"messages": [asked]}]
    questions = write_jsonl(tmp_path / "questions.jsonl", rows)
    capsys.readouterr()
    assert generate_file(study, questions, "--system", "Be long.") == 0
    brief, long = lines_of(capsys.readouterr().out)
    told = PROMPT.replace(PROMPT.split("\n", 1)[0], "{}")
    assert (brief["prompt"], long["prompt"]) == (told.format("Be brief."), told.format("Be long."))
    assert answer(capsys, study, "best", "--system", "Be long.") == long["answer"].rstrip("\n")


def test_a_file_of_prompts(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To standard output and to a file, at once, one by one, and in several runs of which one was killed."""
    monkeypatch.chdir(study)
    questions, answers = write_jsonl(tmp_path / "questions.jsonl", ROWS), tmp_path / "answers.jsonl"
    expected = answer(capsys, study, "best")
    capsys.readouterr()
    assert generate_file(study, questions, "--compare") == 0
    together = capsys.readouterr()
    said = lines_of(together.out)
    assert [line["row"] for line in said] == list(range(1, 8))
    assert said[0]["prompt"] == said[1]["prompt"] == PROMPT
    assert said[2]["prompt"] == said[3]["prompt"] == WITH_INPUT
    assert said[0]["answer"] == said[1]["answer"] == expected != said[0]["base"]
    assert "7 answers in" in together.err
    assert generate_file(study, questions, "--compare", "--batch-size", "1", "--output", str(answers)) == 0
    whole = answers.read_text()
    assert lines_of(whole) == said
    for other in ((), ("--compare", "--temperature", "1"), ("--compare", "--max-new-tokens", "9")):
        assert generate_file(study, questions, "--output", str(answers), *other) == 2
        assert "another prompt, trial or options" in capsys.readouterr().err
    assert answers.read_text() == whole
    link = study / "runs" / "round1" / f"trial-{best_of(study).number:04d}" / "best"
    best = link.readlink()
    later = shutil.copytree(link.resolve(), link.resolve().with_name("step-999999"))
    for target, code in ((later, 2), (best, 0)):
        link.unlink()
        link.symlink_to(target)
        assert generate_file(study, questions, "--compare", "--output", str(answers)) == code
    answers.write_text("".join(whole.splitlines(keepends=True)[3:])[:-5])
    assert generate_file(study, questions, "--compare", "--output", str(answers)) == 0
    assert answers.read_text() == whole
    assert "has 3 of 7 answers" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_answered_and_says_how_to_go_on(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pressed while the model makes the third answer."""
    monkeypatch.chdir(study)
    questions, answers = write_jsonl(tmp_path / "questions.jsonl", ROWS), tmp_path / "answers.jsonl"
    whole, left = LlamaForCausalLM.generate, 2

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    options = ("--base", "--batch-size", "1", "--output", str(answers))
    assert generate_file(study, questions, *options) == 130
    said = capsys.readouterr().err
    assert (
        f"stopped; 2 of 7 answers are in {answers}; resume with: tuner -C {study} trial generate best" in said
    )
    assert len(lines_of(answers.read_text())) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"instruction": "Name', ":2: not one JSON object a line"),
        ("[1]", ":2: a list; a row must be an object"),
        ('{"question": "Why?"}', ":2: no column 'instruction'; columns found: 'question'"),
        ('{"instruction": null}', ":2: column 'instruction' is null; it must be text"),
        ('{"prompt": 3}', ":2: column 'prompt' is the number 3; it must be text"),
        ('{"prompt": "a", "context": []}', ":2: column 'context' is a list; it must be text"),
        ('{"prompt": "\\ud800"}', ":2: contains a lone surrogate"),
        ('{"prompt": "' + "long " * 3000 + '"}', ":2: it has"),
    ],
)
def test_malformed_rows(
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    row: str,
    words: str,
) -> None:
    monkeypatch.chdir(study)
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(json.dumps(ROWS[0]) + f"\n{row}\n")
    assert generate_file(study, questions, "--output", str(answers)) == 2
    assert f"error: {questions}{words}" in capsys.readouterr().err
    assert not answers.exists()


@pytest.mark.parametrize("batch", [(), ("--base",), ("--batch-size", "1")])
def test_a_token_that_the_embedding_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch: tuple[str, ...]
) -> None:
    """Before anything is generated, with the row of it."""
    shutil.copytree(BASE, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["harbour_town"])
    tokenizer.save_pretrained(tmp_path / "base")
    study = tmp_path / "study"
    simulate(study, base=tmp_path / "base")
    for trial in trials(study):
        link = study / "runs" / "round1" / f"trial-{trial.number:04d}" / "best"
        write_adapter(link.resolve(), seed=0)
        adopt(study, trial)
    round_file(study, base=tmp_path / "base")
    rows = [{"prompt": prompt} for prompt in ("Where?", "Where is harbour_town?")]
    questions = write_jsonl(tmp_path / "questions.jsonl", rows)
    answers = tmp_path / "answers.jsonl"
    assert generate_file(study, questions, "--output", str(answers), *batch) == 2
    said = capsys.readouterr().err
    assert f"error: {questions}:2: has the token 'harbour_town' (" in said
    assert not answers.exists()
    assert run(["-C", str(study), "trial", "generate", "best", "--prompt", "A harbour_town"]) == 2
    assert "--prompt: has the token 'harbour_town'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "pass exactly one of --prompt"),
        (["--prompt", "a", "--input", "b.jsonl"], "pass exactly one of --prompt and --input"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "a", "--output", "b.jsonl"], "--output requires --input"),
        (["--prompt", "a", "--batch-size", "2"], "--batch-size requires --input"),
        (["--input", "b.jsonl", "--stream"], "--stream requires --prompt"),
        (["--input", "b.jsonl", "--context", "c"], "--context requires --prompt"),
        (["--input", "b.jsonl", "--output", "./b.jsonl"], "is the file of prompts"),
        (["--input", "b.jsonl"], "b.jsonl: there is no such file"),
        (["--prompt", "a", "--base", "--compare"], "pass at most one of --base"),
        (["--prompt", "a", "--top-k", "5"], "pass a --temperature above 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "--top-p 1.5: expects a probability"),
        (["--prompt", "a", "--temperature", "-1"], "expects at least 0, got -1"),
    ],
)
def test_options_that_do_not_go_together(
    study: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(study)
    assert run(["trial", "generate", "best", *options]) == 2
    assert words in capsys.readouterr().err


def test_names(study: Path) -> None:
    folder = open_folder(study)
    assert find_trial(folder, "best") == (best_of(study), 8)
    for number in range(6):
        for name in (str(number), f"round1/{number}"):
            assert (found := find_trial(folder, name)[0]).number == number
            assert found.round == "round1"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("6", "round1 has trials 0 to 5"),
        ("-1", "round1 has trials 0 to 5"),
        ("round1/6", "round1 has trials 0 to 5"),
        ("round1/", "ROUND/NUMBER, NUMBER or best"),
        ("bets", "ROUND/NUMBER, NUMBER or best"),
        ("round2/0", "started: round1"),
    ],
)
def test_names_that_mean_no_trial(study: Path, name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        find_trial(open_folder(study), name)
    assert str(refused.value).startswith(f"{name}: ")


def test_a_trial_without_an_adapter(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    lost = next(t for t in trials(study) if t.state == TrialState.INFEASIBLE)
    link = study / "runs" / "round1" / f"trial-{lost.number:04d}" / "best"
    link.unlink(missing_ok=True)
    assert run(["trial", "generate", str(lost.number), "--prompt", INSTRUCTION]) == 2
    assert f"round1/{lost.number} is infeasible and has no adapter" in capsys.readouterr().err


def test_an_adapter_that_is_gone(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    gone = next(t for t in trials(study) if t.state == TrialState.COMPLETE)
    link = study / "runs" / "round1" / f"trial-{gone.number:04d}" / "best"
    link.rename(link.with_name("elsewhere"))
    try:
        assert run(["trial", "generate", str(gone.number), "--prompt", INSTRUCTION]) == 2
    finally:
        link.with_name("elsewhere").rename(link)
    assert f"tuner trial reproduce round1/{gone.number} --restore" in capsys.readouterr().err


def test_best_before_any_round_has_begun(tmp_path: Path) -> None:
    round_file(tmp_path)
    with pytest.raises(InputError, match=r"start with: tuner study run round1\.yaml"):
        find_trial(open_folder(tmp_path), "best")
