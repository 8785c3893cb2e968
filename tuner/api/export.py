"""Export a trial as an adapter, a merged model, or a configuration and rows for another tool."""

from __future__ import annotations

import glob
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tuner.api.run import Prepare, Tell
from tuner.data import load_tokenizer, render_prompt
from tuner.data.pretrained import as_trained
from tuner.data.preview import stated_licence
from tuner.data.prompts import chat_template_of, renders_prompts_of
from tuner.errors import InputError, TunerError
from tuner.installation import version
from tuner.playbook import best_evaluation
from tuner.records import RoundRecord, Trial, TrialState
from tuner.report.card import Card, CheckpointCard, checkpoint_card, merging_note, model_card
from tuner.study.folder import StudyFolder, opened
from tuner.study.lookup import begun_round, find_trial
from tuner.whole import replaced_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import RoundSpec


_MARKS = ("adapter_config.json", "config.json", "axolotl.yaml", "llamafactory.yaml", "trl.yaml")
"""Every exported directory holds one of these files."""


def require_free(directory: Path, *, force: bool, keep: Path) -> None:
    """Raise InputError unless an export may replace or create this directory.

    It must be missing or empty, or an earlier export with `force`. `keep` is the study's folder: neither it
    nor its parents are ever replaced.
    """
    if keep.resolve().is_relative_to(directory.resolve()):
        raise InputError(f"--to {directory}: contains the study; choose a separate directory")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--to {directory}: is a file; pass a directory")
    if directory.is_symlink():
        raise InputError(f"--to {directory}: is a link; pass the directory it points to")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not force:
        raise InputError(
            f"--to {directory}: not empty; choose another directory, or replace an export with --force"
        )
    if not any((directory / mark).is_file() for mark in _MARKS):
        raise InputError(
            f"--to {directory}: is not an export (no {' or '.join(_MARKS[:2])}), and --force replaces only "
            "exports; choose another directory"
        )


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """Yield a new directory to write into; it replaces `directory` at the end, and is deleted on an error.

    What an export to the same place that was killed left is deleted first. Raises TunerError if it cannot be
    written.
    """
    absolute = Path(os.path.normpath(directory.absolute()))
    temporary, old = (
        absolute.with_name(f".{absolute.name}.{os.getpid()}.{end}") for end in ("tmp", "old.tmp")
    )
    for left in absolute.parent.glob(f".{glob.escape(absolute.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        replaced_whole(absolute, temporary)
    except OSError as error:
        raise TunerError(f"--to {directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not absolute.exists():
            old.rename(absolute)
        shutil.rmtree(old, ignore_errors=True)


_CONVERTERS = ("convert_hf_to_gguf.py", "llama-convert-hf-to-gguf")
"""Names of llama.cpp's converter."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What to export, and where to."""

    to: Path
    force: bool = False
    """Replace an earlier export."""
    merge: bool = False
    dtype: str | None = None
    """Type of merged weights; None is bfloat16."""
    licence: str | None = None
    """Licence of the export, for its model card."""
    gguf: Path | None = None
    gguf_converter: Path | None = None
    """None searches the PATH."""
    push: str | None = None
    """Repository on the Hub to push to."""
    public: bool = False
    """Whether a newly created repository is public."""

    def __post_init__(self) -> None:
        for option, value, needed in (
            ("--dtype", self.dtype, "--merge" if not self.merge else None),
            ("--gguf-converter", self.gguf_converter, "--gguf" if self.gguf is None else None),
            ("--public", self.public, "--push" if self.push is None else None),
        ):
            if value and needed:
                raise InputError(f"{option} requires {needed}")

    @property
    def merged_dtype(self) -> str:
        """Return the type of the merged weights."""
        return self.dtype or "bfloat16"

    def command(self, trial: str) -> str:
        """Return the command line without what reveals this machine: the converter and absolute paths."""
        options: dict[str, object] = {
            "--to": _told(self.to),
            "--merge": self.merge,
            "--dtype": self.dtype,
            "--license": self.licence,
            "--gguf": _told(self.gguf) if self.gguf else None,
            "--push": self.push,
            "--public": self.public,
        }
        words = ["tuner", "trial", "export", trial]
        for option, value in options.items():
            words += [option] if value is True else [option, str(value)] if value else []
        return shlex.join(words)


def _told(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)


@dataclass(frozen=True)
class Finished:
    """A complete trial with the files to share."""

    trial: Trial
    record: RoundRecord
    written: RoundSpec
    """The round file as written, with the base model's revision set to the commit that was trained on."""
    spec: RoundSpec
    """The round file with absolute paths."""
    adapter: Path

    @property
    def name(self) -> str:
        """Such as `round1/7`."""
        return self.trial.name

    @property
    def base_is_on_hub(self) -> bool:
        """Whether others can load the base model by its name."""
        return not Path(self.spec.model.path).is_absolute()


def finished_trial(folder: StudyFolder, name: str) -> Finished:
    """Return the complete trial with this name. Raises InputError for an incomplete one, with the reason,
    and CheckpointError for a damaged adapter.
    """
    if folder.is_dry_run:
        raise InputError(f"{folder.directory}: a dry run trains nothing, so no trial has an adapter")
    trial, _ = find_trial(folder, name)
    path = trial.name
    if trial.state != TrialState.COMPLETE:
        raise InputError(f"{name}: {path} is {trial.state}{_why(trial)}; see: tuner trial list")
    plan = folder.plan(trial.round)
    adapter = folder.verified_adapter(trial)
    if adapter is None:
        raise InputError(
            f"{name}: the adapter of {path} is missing from {folder.checkpoints(trial.round).root}; "
            f"restore it with: tuner trial reproduce {path} --restore"
        )
    with opened(folder) as store:
        record = begun_round(store, trial.round)
    written, spec = (as_trained(each, adapter) for each in (plan.spec, plan.absolute))
    return Finished(trial, record, written, spec, adapter)


def _why(trial: Trial) -> str:
    match trial.state:
        case TrialState.WAITING | TrialState.RUNNING:
            return " and not yet trained to the end: its best step is not known yet"
        case TrialState.INFEASIBLE:
            return f" ({trial.reason}): it has no result to share"
        case _:
            return f" ({trial.reason})" if trial.reason else ""


def export_trial(finished: Finished, export: Export, *, study: Path, tell: Tell, warn: Tell) -> None:
    """Write the directory, then the GGUF file, then push; each step starts once the previous one is complete.

    `tell` is called with what was written, `warn` with what users of the export must know. Raises InputError
    before anything is written, TunerError if writing fails.
    """
    require_free(export.to, force=export.force, keep=study)
    if finished.spec.command is not None:
        _export_checkpoint(finished, export, study, tell)
        return
    converter = _converter(export)
    token = _token(export, None if finished.base_is_on_hub else finished.written.model.path)
    tokenizer = load_tokenizer(finished.spec.model)
    template = chat_template_of(finished.spec.data.train, tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    card = _card(finished, export, tokenizer)

    # Loads torch: only after the cheap checks.
    from tuner.adapters.generation import ends_unlike_its_base, warning_of_ends

    ends = ends_unlike_its_base(finished.spec.model, tokenizer)
    text = model_card(replace(card, ends=tuple(ends)))
    model = finished.spec.model
    _write(export, finished, tokenizer, text)
    if export.merge:
        tell(f"{export.to}: {finished.name} merged. {merging_note(model, export.merged_dtype)}")
    else:
        tell(f"{export.to}: the adapter of {finished.name}, with tokenizer and model card")
        if ends:
            warn(warning_of_ends(ends, tokenizer))
    _convert_and_push(export, converter, token, tell)


_OF_RESUMING = (
    "optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "trainer_state.json",
)  # fmt: skip
"""Files of a Trainer's checkpoint that only resuming needs; most are pickles."""


def _export_checkpoint(finished: Finished, export: Export, study: Path, tell: Tell) -> None:
    """Write the checkpoint of a command's trial as it is, or merged where it is a PEFT adapter.

    What is pushed has a model card and nothing that only resuming needs. Raises as `export_trial`.
    """
    base = _base_of_checkpoint(finished, export)
    merges = export.merge and base is not None
    is_local = base is not None and (Path(base).is_absolute() or (study / base).is_dir())
    converter = _converter(export)
    token = _token(export, base if is_local else None)
    with appearing_whole(export.to) as directory:
        if merges:
            from tuner.inference import merge_checkpoint  # loads torch

            merge_checkpoint(finished.adapter, directory, beside=study, dtype=export.merged_dtype)
        else:
            left_out = shutil.ignore_patterns(*_OF_RESUMING) if export.push else None
            shutil.copytree(finished.adapter, directory, dirs_exist_ok=True, ignore=left_out)
        if merges or export.push:
            card = CheckpointCard(
                name=export.push or export.to.name,
                spec=finished.written,
                trial=finished.trial,
                base=base,
                base_is_on_hub=not is_local,
                command=export.command(finished.name),
                merged_dtype=export.merged_dtype if merges else None,
                licence=export.licence,
            )
            (directory / "README.md").write_text(checkpoint_card(card), encoding="utf-8")
    how = f"merged into {base} in {export.merged_dtype}" if merges else "as the command wrote it"
    tell(f"{export.to}: the checkpoint of {finished.name}, {how}")
    _convert_and_push(export, converter, token, tell)


def _base_of_checkpoint(finished: Finished, export: Export) -> str | None:
    """Return the base model that a PEFT adapter names; None for another checkpoint.

    Raises InputError for options that this checkpoint cannot have.
    """
    config = finished.adapter / "adapter_config.json"
    is_model = (finished.adapter / "config.json").is_file()
    if export.licence and not (export.merge or export.push):
        raise InputError(
            "--license: a checkpoint is copied as it is; the licence belongs to the model card "
            "that --merge and --push write"
        )
    if config.is_file():
        try:
            return str(json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config}: names no base model: {error}") from error
    found = f"the checkpoint of {finished.name} is not a PEFT adapter (it has no adapter_config.json)"
    if (export.push or export.gguf) and not is_model:
        raise InputError(
            f"--{'push' if export.push else 'gguf'}: {found} and not a transformers model (it has no "
            "config.json): export it as it is, and use the tool that trained it"
        )
    if export.merge and not export.gguf:
        raise InputError(f"--merge: {found}: leave --merge out to copy it as it is")
    return None


def _convert_and_push(export: Export, converter: Path | None, token: str | None, tell: Tell) -> None:
    """Convert and upload the directory, which is complete."""
    from tuner.inference import convert_to_gguf, push  # loads torch

    if export.gguf is not None and converter is not None:
        convert_to_gguf(export.to, export.gguf, converter=converter, dtype=export.merged_dtype)
        tell(f"{export.gguf}: the merged model, by {converter.name}")
    if export.push is not None and token is not None:
        tell(f"pushed to {push(export.to, export.push, token=token, public=export.public)}")


def _write(export: Export, finished: Finished, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write the directory; it appears once it is complete."""
    from tuner.inference import export_adapter, export_merged

    model = finished.spec.model
    with appearing_whole(export.to) as directory:
        if export.merge:
            export_merged(
                finished.adapter, directory, model=model, tokenizer=tokenizer, dtype=export.merged_dtype
            )
        else:
            export_adapter(finished.adapter, directory, model=model, tokenizer=tokenizer)
        (directory / "README.md").write_text(card, encoding="utf-8")


def _converter(export: Export) -> Path | None:
    """Raise InputError if a GGUF file is requested but cannot be made."""
    if export.gguf is None:
        return None
    if export.gguf.is_dir():
        raise InputError(f"--gguf {export.gguf}: is a directory; pass the name of a file")
    if export.gguf.exists() and not export.force:
        raise InputError(f"--gguf {export.gguf}: exists; choose another name, or pass --force to replace it")
    if export.gguf_converter is not None:
        if not export.gguf_converter.is_file():
            raise InputError(f"--gguf-converter {export.gguf_converter}: no such file")
        return export.gguf_converter.absolute()
    found = next((path for name in _CONVERTERS if (path := shutil.which(name))), None)
    if found is None:
        raise InputError(
            "--gguf: llama.cpp's converter is not installed: no "
            f"{' or '.join(_CONVERTERS)} on the PATH. Get it with: git clone --depth 1 "
            "https://github.com/ggml-org/llama.cpp; and add --gguf-converter llama.cpp/convert_hf_to_gguf.py"
        )
    return Path(found)


def _token(export: Export, local_base: str | None) -> str | None:
    """Raise InputError if a push is requested but cannot succeed.

    `local_base` is the base model if it is a directory of this machine.
    """
    if export.push is None:
        return None
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(export.push)
    except HFValidationError as error:
        raise InputError(f"--push {export.push}: expects OWNER/NAME: {error}") from None
    if not export.merge and local_base is not None:
        raise InputError(
            f"--push {export.push}: the base model is a local directory ({local_base}), so "
            "others could not load the adapter; add --merge to push the merged model"
        )
    token = get_token()
    if token is None:
        raise InputError(
            f"--push {export.push}: no token; set HF_TOKEN to one with write access "
            "(https://huggingface.co/settings/tokens), or log in with: hf auth login"
        )
    return token


def _card(finished: Finished, export: Export, tokenizer: PreTrainedTokenizerBase) -> Card:
    data = finished.spec.data
    hub_sources = tuple(dict.fromkeys(source.path for source in data.train if _is_id(source.path)))
    has_input = data.train[0].format == "alpaca"
    return Card(
        name=export.push or export.to.name,
        spec=finished.written,
        record=finished.record,
        trial=finished.trial,
        base_is_on_hub=finished.base_is_on_hub,
        prompt=_prompt(finished, tokenizer),
        prompt_with_input=_prompt(finished, tokenizer, input="{input}") if has_input else None,
        has_chat_template=renders_prompts_of(data.train),
        command=export.command(finished.name),
        versions=dict(_versions()),
        merged_dtype=export.merged_dtype if export.merge else None,
        licence=export.licence,
        stated_licences=dict(_stated_licences(finished, hub_sources)),
        hub_sources=hub_sources,
        test_loss=finished.trial.final_score.loss if finished.trial.final_score else None,
    )


def _is_id(path: str) -> bool:
    return not Path(path).is_absolute() and "://" not in path


def _prompt(finished: Finished, tokenizer: PreTrainedTokenizerBase, *, input: str = "") -> str | None:
    """Render a prompt with the first source's template; None for plain text, which has no prompt."""
    source = finished.spec.data.train[0]
    if source.format == "text":
        return None
    prompt = render_prompt(
        source.format, tokenizer, instruction="{instruction}", input=input, template=source.template
    )
    return str(tokenizer.decode(prompt.ids))


def _stated_licences(finished: Finished, hub_sources: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if licence := stated_licence(finished.spec.model.path, kind="model"):
        yield finished.written.model.path, licence
    for path in hub_sources:
        if licence := stated_licence(path, kind="dataset"):
            yield path, licence


def _versions() -> Iterator[tuple[str, str]]:
    yield "tuner", version()
    for package in _PACKAGES:
        try:
            yield package, version_of(package)
        except PackageNotFoundError:
            continue


def export_recipe(
    finished: Finished, tool_name: str, *, to: Path, force: bool, study: Path, prepare: Prepare, tell: Tell
) -> str:
    """Write a trial's configuration and rows for another tool; return the tool's command."""
    from tuner.data.preview import write_parquet, write_to_disk
    from tuner.report.exporters import TOOLS, Recipe, recipe_file

    require_free(to, force=force, keep=study)
    finished.spec.require_model(f"--as {tool_name}")
    tool, spec, trial = TOOLS[tool_name], finished.spec, finished.trial
    best = best_evaluation(trial.evaluations)
    if best is None or best.step == 0:
        raise InputError(
            f"{finished.name}: its best step is 0, the base model: there is no training to repeat"
        )
    recipe = Recipe(
        trial=finished.name,
        model=spec.model,
        hyperparameters=trial.hyperparameters,
        max_train_steps=finished.record.max_train_steps,
        best_step=best.step,
        max_length=spec.data.max_length,
        every_steps=spec.evaluation.every_steps,
        eval_batch_size=spec.evaluation.batch_size,
    )
    rows = prepare(spec, study / ".tuner-cache")
    with appearing_whole(to) as directory:
        write = write_to_disk if tool.rows_on_disk else write_parquet
        write({"train": rows.train, tool.held_out: rows.evaluation}, directory / "rows")
        (directory / tool.file).write_text(recipe_file(tool, recipe), encoding="utf-8")
    tell(f"{to}: {tool.file} for {tool.name}, and the rows of training and evaluation")
    return f"cd {shlex.quote(str(to.absolute()))} && {tool.command}"
