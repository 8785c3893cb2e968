"""The model card of an export: base model, data, training, results and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tuner.config import ModelSpec, RoundSpec, SourceSpec
from tuner.methods.variants import PLAIN, variant_of
from tuner.methods.variants.lora import USE_RSLORA
from tuner.playbook.selection import best_evaluation
from tuner.records import LOSS, Evaluation, Hyperparameters, RoundRecord, Trial, Value
from tuner.report import format
from tuner.report.notes import code, escaped, table

_ROWS_OF_THE_CURVE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The facts of a model card."""

    name: str
    """Name of the exported directory."""
    spec: RoundSpec
    """The round file as written, so that no path of this machine is revealed."""
    record: RoundRecord
    trial: Trial
    base_is_on_hub: bool
    prompt: str | None
    """Training prompt with the user's text in braces; None if there is none."""
    has_chat_template: bool
    """Whether the exported tokenizer renders this prompt."""
    prompt_with_input: str | None = None
    """Prompt of rows with an input, whose template may differ; None if there are none."""
    command: str
    """Command of the export."""
    versions: Mapping[str, str]
    """Package versions by name."""
    merged_dtype: str | None = None
    """None for an adapter."""
    ends: tuple[int, ...] = ()
    """Tokens that end an answer, if the base model does not stop at the trained one by default."""
    licence: str | None = None
    """Licence of the export, as stated by its author."""
    stated_licences: Mapping[str, str] = field(default_factory=dict)
    """Licences stated by base model and data, by path."""
    hub_sources: tuple[str, ...] = ()
    """Training datasets on the Hub."""
    test_loss: float | None = None
    """Loss on `data.test`, which was not used for any choice; None if not scored."""


def model_card(card: Card) -> str:
    """Return the README.md of an exported directory, front matter first."""
    return "\n\n".join(
        block
        for block in (
            f"---\n{_front_matter(card)}\n---",
            f"# {escaped(card.name)}",
            _opening(card),
            "## Use",
            f"```python\n{_usage(card)}\n```",
            *_prompt(card),
            "## Result",
            _result(card),
            _curve(card.trial.evaluations),
            "## Training",
            _facts(_training(card)),
            "Hyperparameters:",
            _hyperparameters(card.trial.hyperparameters),
            "## Made by",
            f"```\n{card.command}\n```",
            "In the study's folder, this trains the trial again and compares the curves:",
            f"```\ntuner trial reproduce {card.trial.name}\n```",
            f"With {', '.join(f'{name} {version}' for name, version in card.versions.items())}.",
        )
        if block
    ) + "\n"  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCard:
    """The facts of the model card of a command's checkpoint, whose model and rows tuner does not know."""

    name: str
    """Name of the exported directory."""
    spec: RoundSpec
    trial: Trial
    base: str | None
    """The base model of an adapter; None for a whole model."""
    base_is_on_hub: bool
    command: str
    """Command of the export."""
    merged_dtype: str | None = None
    """None for a checkpoint as it was written."""
    licence: str | None = None


def checkpoint_card(card: CheckpointCard) -> str:
    """Return the README.md of a command's checkpoint, front matter first."""
    return "\n\n".join(
        (
            f"---\n{_front_matter_of_checkpoint(card)}\n---",
            f"# {escaped(card.name)}",
            _opening_of_checkpoint(card),
            "## Result",
            _result_of_checkpoint(card),
            _curve(card.trial.evaluations),
            "## Training",
            "Hyperparameters:",
            _hyperparameters(card.trial.hyperparameters),
            "## Made by",
            f"```\n{card.command}\n```",
            "In the study's folder, this trains the trial again and compares the curves:",
            f"```\ntuner trial reproduce {card.trial.name}\n```",
        )
    ) + "\n"  # fmt: skip


def _front_matter_of_checkpoint(card: CheckpointCard) -> str:
    from huggingface_hub import ModelCardData

    tool = card.spec.command.tool if card.spec.command else "none"
    data = ModelCardData(
        base_model=card.base if card.base_is_on_hub else None,
        library_name="peft" if card.base is not None and card.merged_dtype is None else "transformers",
        license=card.licence,
        tags=["tuner", *([] if tool == "none" else [tool])],
    )
    return str(data.to_yaml()).strip()


def _opening_of_checkpoint(card: CheckpointCard) -> str:
    if card.base is None:
        what = "A model"
    elif card.merged_dtype is None:
        what = f"An adapter for {code(_told(card.base))}"
    else:
        what = f"An adapter merged into {code(_told(card.base))} in {card.merged_dtype}"
    goal = f" The goal of the study: {escaped(card.spec.goal)}" if card.spec.goal else ""
    return (
        f"{what}: trial {card.trial.number} of {escaped(card.spec.round)} in the study "
        f"{escaped(card.spec.study)}, at the best of its evaluations.{goal}"
    )


def _result_of_checkpoint(card: CheckpointCard) -> str:
    best = best_evaluation(card.trial.evaluations)
    assert best is not None, "a complete trial has been evaluated"
    metric = LOSS.metric if best.objective is None else best.objective.metric
    return (
        f"Best {code(metric)} {format.loss(best.value)}, at step {best.step} of {card.spec.max_train_steps}."
    )


def merging_note(model: ModelSpec, dtype: str) -> str:
    """Describe in a sentence how the adapter was merged."""
    base = {
        "nf4": "The base's weights were quantised to NF4 with double quantisation and de-quantised again, "
        "since the adapter was trained on those; the adapter was added",
        "int8": "The base's weights were quantised to 8 bits and de-quantised again, since the adapter was "
        "trained on those; the adapter was added",
        "none": f"The adapter was added to the base's {model.dtype} weights",
    }[model.quantization]
    return f"{base} in float32, and the sum rounded to {dtype}."


def _front_matter(card: Card) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=card.spec.model.path if card.base_is_on_hub else None,
        library_name="transformers" if card.merged_dtype else "peft",
        pipeline_tag="text-generation",
        license=card.licence,
        datasets=list(card.hub_sources) or None,
        tags=_tags(card),
    )
    return str(data.to_yaml()).strip()


def _tags(card: Card) -> list[str]:
    values = card.trial.hyperparameters
    tags = ["tuner", "lora"]
    if (chosen := variant_of(values)).name != PLAIN:
        tags.append(chosen.name.rpartition(":")[2].lower())
    if USE_RSLORA.value(values):
        tags.append("rslora")
    return [*tags, *(["qlora"] if card.spec.model.quantization == "nf4" else [])]


def _opening(card: Card) -> str:
    what = "A LoRA adapter for" if card.merged_dtype is None else "A LoRA adapter merged into"
    goal = f" The goal of the study: {escaped(card.spec.goal)}" if card.spec.goal else ""
    merged = f" {merging_note(card.spec.model, card.merged_dtype)}" if card.merged_dtype else ""
    return (
        f"{what} {_base(card.spec.model)}: trial {card.trial.number} of {escaped(card.spec.round)} in the "
        f"study {escaped(card.spec.study)}, at the best of its evaluations.{goal}{merged}"
    )


def _base(model: ModelSpec) -> str:
    parts = (
        f"revision {escaped(model.revision)}" if model.revision else "",
        f"file {code(model.gguf_file)}" if model.gguf_file else "",
    )
    more = ", ".join(part for part in parts if part)
    return code(_told(model.path)) + (f" ({more})" if more else "")


def _usage(card: Card) -> str:
    model = card.spec.model
    if card.merged_dtype is not None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{card.name}", dtype="{card.merged_dtype}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{card.name}")'
        )
    options = {
        "revision": model.revision,
        "gguf_file": model.gguf_file,
        "trust_remote_code": True if model.trust_remote_code else None,
        "dtype": model.dtype,
    }
    said = "".join(f", {name}={_python(value)}" for name, value in options.items() if value is not None)
    quantised = _QUANTISATION[model.quantization]
    imports = ("AutoModelForCausalLM", "AutoTokenizer", *(["BitsAndBytesConfig"] if quantised else []))
    ends = (
        "# Answers were trained to end with the first of these; the base model does not stop there.\n"
        f"base.generation_config.eos_token_id = {list(card.ends)}\n"
        if card.ends
        else ""
    )
    return (
        "from peft import PeftModel\n"
        f"from transformers import {', '.join(imports)}\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({_python(_told(model.path))}{said}{quantised})\n{ends}"
        f'model = PeftModel.from_pretrained(base, "{card.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{card.name}")'
    )


def _python(value: str | bool) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


_QUANTISATION = {
    "none": "",
    "nf4": ', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)",
    "int8": ", quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
}


def _prompt(card: Card) -> Sequence[str]:
    if card.prompt is None:
        return ()
    by = (
        "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` renders it."
        if card.has_chat_template
        else "The tokenizer has no template that renders it."
    )
    shown = [f"It was trained on this prompt. {by}", f"```\n{card.prompt}\n```"]
    if card.prompt_with_input is not None:
        shown += ["Rows with an input use this prompt:", f"```\n{card.prompt_with_input}\n```"]
    return shown


def _result(card: Card) -> str:
    best = best_evaluation(card.trial.evaluations)
    assert best is not None, "a complete trial has been evaluated"
    base_loss = next((e.eval_loss for e in card.trial.evaluations if e.step == 0), None)
    before = f" The base model has {format.loss(base_loss)}." if base_loss is not None else ""
    tested = (
        f" On test rows not used for any choice: {format.loss(card.test_loss)}."
        if card.test_loss is not None
        else ""
    )
    chosen = "" if best.objective is None else f" Best {best.objective.metric}: {format.loss(best.value)}."
    answers = card.trial.answer_score
    said = f" Answer score: {escaped(format.answers_in_words(answers))}; higher is better." if answers else ""
    return (
        f"Evaluation loss {format.loss(best.eval_loss)} at step {best.step} of {card.record.max_train_steps} "
        f"in nats per target token, on {format.count(card.record.eval_rows, 'held-out row')}."
        f"{before}{chosen}{said}{tested}"
    )


def _curve(evaluations: Sequence[Evaluation]) -> str:
    best = best_evaluation(evaluations)
    shown = _thinned(evaluations, keep=best)
    rows = [
        (str(e.step), format.loss(e.train_loss), format.loss(e.eval_loss), "best" if e is best else "")
        for e in shown
    ]
    return table(("step", "train loss", "evaluation loss", ""), rows, num_words=1)


def _thinned(evaluations: Sequence[Evaluation], *, keep: Evaluation | None) -> list[Evaluation]:
    """Thin out evaluations evenly, keeping the first, the last and the best."""
    last = len(evaluations) - 1
    wanted = min(_ROWS_OF_THE_CURVE, len(evaluations))
    places = {round(i * last / max(1, wanted - 1)) for i in range(wanted)}
    return [e for place, e in enumerate(evaluations) if place in places or e is keep]


def _training(card: Card) -> Mapping[str, str]:
    spec, model = card.spec, card.spec.model
    data = spec.data
    licences = [f"{escaped(_told(path))}: {escaped(stated)}" for path, stated in card.stated_licences.items()]
    facts = {
        "Base": f"{_base(model)}, {model.dtype}, quantization {model.quantization}",
        "Training data": "; ".join(_source(source) for source in data.train),
        "Evaluation data": "; ".join(_source(source) for source in data.eval)
        or f"{format.percent(data.eval_fraction or 0)} of the training rows, held out by their content",
        "Rows": f"{card.record.train_rows:,} for training, {card.record.eval_rows:,} for evaluation",
        "Length": f"{data.max_length} tokens at most; the loss is on "
        + ("the completion" if data.loss_on == "completion" else "all tokens"),
        "Licences stated": "; ".join(licences),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _hyperparameters(values: Hyperparameters) -> str:
    rows = [(name, _exact(value)) for name, value in values.items()]
    return table(("name", "value"), rows, num_words=2)


def _exact(value: Value) -> str:
    """Format with every digit, so that the card suffices to train again."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else format.value(value)


def _source(source: SourceSpec) -> str:
    parts = {
        "format": source.format,
        "template": source.template,
        "configuration": source.config,
        "split": source.split,
        "weight": None if source.weight == 1 else format.number(source.weight),
    }
    said = ", ".join(f"{name} {escaped(value)}" for name, value in parts.items() if value is not None)
    return f"{code(_told(source.path))} ({said})"


def _told(path: str) -> str:
    """Reduce an absolute path to its last name; strip user, password and query from a URL."""
    if "://" in path:
        url = urlsplit(path)
        return urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))
    return Path(path).name if Path(path).expanduser().is_absolute() else path


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
