"""`study check`: validate file, tokenizer, data and model without recording anything."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.api.probe import probed_worker, run_probe
from tuner.api.run import Where
from tuner.commands.check import mistakes
from tuner.commands.check import remarks as command_remarks
from tuner.commands.size import estimated_bytes
from tuner.config import HYPERPARAMETERS, ModelSpec, RoundFile, RoundSpec, load_round, with_plug_ins
from tuner.data import (
    PreparedData,
    load_tokenizer,
    refuse_tokens_beyond,
    refuse_unlike_metric,
)
from tuner.data import prepare as prepare_rows
from tuner.data.answer_metrics import EXACT_MATCH, METRIC_KEY, shown_metric
from tuner.data.pretrained import loaded_commit, model_fingerprint
from tuner.engines import make_engine
from tuner.errors import DataError, InputError, MetricError, Mistake, ModelError, RoundFileError
from tuner.methods.registry import Kind, is_built_in
from tuner.playbook.noise import loss_error
from tuner.records import Evaluation, Prediction
from tuner.report import check_document
from tuner.report.documents import RoundPlan
from tuner.report.format import count, percent, size
from tuner.store import refuse_damaged
from tuner.study.check import planned_commands, planned_hours, planned_round
from tuner.study.dashboard import command_after
from tuner.study.disk import RoundDisk, checkpoints_of_commands, free_bytes, taken_back
from tuner.study.folder import open_folder, opened
from tuner.study.plan import RoundPlan as StudyPlan
from tuner.study.run import (
    base_evaluation,
    changed_model,
    load_plug_ins,
    other_workload,
    recorded_data,
    recorded_workload,
    refuse_changed_file,
    refuse_lost_database,
    refuse_other_data,
    refuse_uninstalled,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HERE = Where()
"""As the round file says."""
PrepareWith = Callable[[RoundSpec, Path, "PreTrainedTokenizerBase"], PreparedData]
"""Prepares a round's rows with a tokenizer; may show progress."""
MOST_NOISE = 0.02
"""Relative standard error of the base model's loss above which `study check` warns."""
WORTHWHILE_PACKING = 1.1
"""Times the speed of one slot from which packing on a CPU is proposed: less may be noise of a few steps."""
FEW_EXAMPLES = 50
"""Warn below this number of evaluation rows while the standard error is unknown."""


Look = Callable[[PreparedData, "PreTrainedTokenizerBase"], None]
"""Called with the rows before the model is checked, such as to show some."""


def checked(
    path: Path,
    *,
    prepare: PrepareWith,
    probe: bool = False,
    where: Where = HERE,
    look: Look = lambda data, tokenizer: None,
) -> tuple[RoundPlan, list[str], str]:
    """Check a round file, its data and its model; record nothing.

    Returns the plan, remarks and the next command. `probe` loads the base model in a worker of the engine
    and times a few steps; `where` says which. Raises InputError, or RoundFileError with all mistakes of the
    file.
    """
    file = load_round(path)
    try:
        round_plan = StudyPlan(with_plug_ins(file) if probe else file)
        command = _next_command(round_plan, where)
        if probe:
            load_plug_ins(round_plan)
            make_engine(where.engine or round_plan.spec.run.engine).close()
        prober = where if probe else None
        if round_plan.spec.command is not None:
            plan, remarks = _command_plan(round_plan, prober)
        else:
            with taken_back(round_plan.cache):
                plan, remarks = _plan(round_plan, prepare=prepare, prober=prober, look=look)
    except InputError as error:
        raise file.placed(error) from None
    return plan, [*remarks, *_cluster_remarks(file, where)], command


def check_document_of(
    path: Path, *, prepare: PrepareWith, probe: bool = False, where: Where = HERE
) -> dict[str, Any]:
    """Return the document of `study check --json`, mistakes included."""
    try:
        plan, remarks, _ = checked(path, prepare=prepare, probe=probe, where=where)
    except InputError as error:
        return check_document(_mistakes(error), None)
    return check_document([], plan, remarks)


def refuse_unusable(path: Path, *, prepare: PrepareWith) -> None:
    """Raise InputError if `study check` of this file would."""
    round_plan = StudyPlan(load_round(path))
    _next_command(round_plan, HERE)
    if round_plan.spec.command is not None:
        _command_plan(round_plan, None)
        return
    _plan(round_plan, prepare=prepare, prober=None, look=lambda data, tokenizer: None)


def _command_plan(round_plan: StudyPlan, prober: Where | None) -> tuple[RoundPlan, list[str]]:
    """Check a command without running it; a `prober` runs a trial of it to its second evaluation."""
    spec, file = round_plan.absolute, round_plan.file
    found = [Mistake(file.line(name), name, message) for name, message in mistakes(spec, file.directory)]
    if found:
        raise RoundFileError(file.path, sorted(found, key=lambda mistake: mistake.line or 0))
    said = [*command_remarks(spec), *_run_remarks(spec, file.directory), *_continued_remarks(round_plan)]
    size_of_one, source = _checkpoint_of_command(round_plan)
    plan, not_checked = _with_unchecked(_plan_of_commands(spec, size_of_one), spec, probe=prober is not None)
    said += not_checked
    if prober is None:
        said += [source, *_disk_remarks(round_plan, plan)]
        return plan, [*said, "the command was not run; --probe runs a trial to its second evaluation"]
    from tuner.commands.probe import probed

    measured = probed(spec, partial(run_probe, round_plan, prober, said.append))
    hours = planned_hours(
        spec,
        seconds_per_step=measured.seconds_per_step,
        seconds_per_evaluation=0.0,
    )
    plan = replace(_plan_of_commands(spec, measured.checkpoint_bytes), hours=hours)
    return plan, [*said, *measured.remarks, *_disk_remarks(round_plan, plan)]


def _plan_of_commands(spec: RoundSpec, size_of_one: int | None) -> RoundPlan:
    kept = None if size_of_one is None else checkpoints_of_commands(spec, size_of_one)
    return planned_commands(spec, checkpoint_bytes=kept)


def _checkpoint_of_command(round_plan: StudyPlan) -> tuple[int | None, str]:
    """Return the bytes of one checkpoint of a command, None if unknown, and where they come from."""
    with opened(open_folder(round_plan.file.directory)) as store:
        rounds = [record.name for record in store.rounds()]
        trials = [trial for name in rounds for trial in store.trials(name, examples=False)]
    recorded = max((made.size_bytes for trial in trials for made in trial.checkpoints), default=None)
    if recorded is not None:
        return recorded, f"a checkpoint takes up to {size(recorded)}, as the largest of this study"
    estimated = estimated_bytes(round_plan.absolute, round_plan.file.directory)
    if estimated is not None:
        return estimated, f"a checkpoint takes up to about {size(estimated)}, by the base model's layers"
    return None, "the size of a checkpoint is not known before one is written; --probe measures it"


def _disk_remarks(round_plan: StudyPlan, plan: RoundPlan) -> Iterator[str]:
    if (free := free_bytes(round_plan.checkpoints)) < (plan.checkpoint_bytes or 0):
        yield f"{round_plan.checkpoints} has only {size(free)} free: the checkpoints may not fit"


def _next_command(plan: StudyPlan, where: Where) -> str:
    """Return the command to run the round, or the report's next command once the round is complete.

    Raises InputError if a run would, before it checks model and data.
    """
    folder = open_folder(plan.file.directory)
    RoundDisk(plan).refuse_unwritable()
    refuse_damaged(plan.absolute.storage)
    refuse_changed_file(plan)
    refuse_lost_database(plan)
    refuse_uninstalled(plan)
    with opened(folder) as store:
        record = store.round(plan.name)
        ended = store.num_results(plan.name)
        if record is None or ended < plan.spec.num_trials:
            return f"tuner study run {shlex.quote(str(plan.file.path))}{where.options}"
        return command_after(folder, store, record)


def _plan(
    round_plan: StudyPlan, *, prepare: PrepareWith, prober: Where | None, look: Look
) -> tuple[RoundPlan, list[str]]:
    spec = round_plan.absolute
    model = spec.model
    if prober is None:
        model = model.model_copy(update={"trust_remote_code": False})
    with _naming_the_probe(spec.model, prober):
        tokenizer = load_tokenizer(model)
    data = prepare(spec, round_plan.cache, tokenizer)
    data, rows_changed = _rows_of_the_round(round_plan, data, tokenizer)
    refuse_other_data(round_plan, data.fingerprint)
    _refuse_metric(round_plan)
    changed = changed_model(round_plan, model_fingerprint(spec.model))
    look(data, tokenizer)

    # Loads torch: only after the cheap checks.
    from tuner.adapters import embeddings_of, largest_adapter
    from tuner.adapters.generation import ends_unlike_its_base, warning_of_ends
    from tuner.adapters.liger import require_liger
    from tuner.adapters.placement import worker_devices
    from tuner.adapters.varlen import require_varlen

    if model.kernels == "liger" and spec.run.engine == "local":
        require_liger()
    if model.attention == "varlen" and spec.run.engine == "local":
        require_varlen(worker_devices(1)[0])
    with _naming_the_probe(spec.model, prober):
        num_embeddings, adapter_weights = embeddings_of(model), largest_adapter(model, spec.space())
    refuse_tokens_beyond(data, num_embeddings, lambda: tokenizer)
    plan = planned_round(spec, data, adapter_weights=adapter_weights)
    base = _recorded_base(round_plan, data)
    probed: list[str] = []
    if prober is not None:
        plan, base, probed = _probed(round_plan, plan, prober)
    remarks = [*_remarks(spec, data), *rows_changed, *([changed] if changed and prober is None else [])]
    remarks += noise_remarks(
        base, num_examples=len(data.evaluation), max_examples=spec.evaluation.max_examples
    )
    remarks += _answers(round_plan, data)
    remarks += round_plan.file.hints
    remarks += _run_remarks(spec, round_plan.file.directory)
    remarks += _continued_remarks(round_plan)
    plan, not_checked = _with_unchecked(plan, spec, probe=prober is not None)
    remarks += not_checked
    remarks += _model_remarks(spec.model)
    if ends := ends_unlike_its_base(model, tokenizer):
        remarks.append(warning_of_ends(ends, tokenizer))
    remarks += probed
    return plan, [*remarks, *_disk_remarks(round_plan, plan)]


def _rows_of_the_round(
    plan: StudyPlan, data: PreparedData, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedData, list[str]]:
    """Return what a started round trains on, and a remark if the source has other rows now."""
    known = recorded_data(plan)
    if known in (None, data.fingerprint):
        return data, []
    before = prepare_rows(plan.absolute, tokenizer, plan.cache, known=known)
    if before.fingerprint != known:
        return data, []
    said = f"the data has changed since {plan.name} started; {plan.name} keeps using the rows in {plan.cache}"
    return before, [f"warning: {said}"]


@contextmanager
def _naming_the_probe(model: ModelSpec, prober: Where | None) -> Iterator[None]:
    """Say of a model that cannot be read without its own code that only a probe runs it."""
    try:
        yield
    except ModelError as error:
        if prober is not None or not model.trust_remote_code:
            raise
        raise ModelError(
            f"{model.path}: cannot be read without Python code of its repository, which `study check` does "
            f"not run; `study check --probe` does, and so does `study run` ({error})"
        ) from error


def _probed(
    round_plan: StudyPlan, plan: RoundPlan, prober: Where
) -> tuple[RoundPlan, Evaluation | None, list[str]]:
    """Return the plan with time and memory measured over a few steps, the base model, and remarks."""
    said: list[str] = []
    ready = probed_worker(round_plan, prober, said.append)
    recorded = recorded_workload(round_plan)
    if recorded is not None and recorded != ready.workload:
        raise other_workload(round_plan)
    if (predicted := ready.predicted) is None:
        return plan, ready.base, [*said, "the engine's workers do not time steps"]
    hours = planned_hours(
        round_plan.absolute,
        seconds_per_step=predicted.seconds_per_step,
        seconds_per_evaluation=predicted.seconds_per_evaluation,
    )
    plan = replace(plan, peak_memory_bytes=predicted.peak_memory_bytes, hours=hours)
    said.append(f"time and memory are measured with {count(predicted.slots, 'slot')} in one worker")
    said += packing_remarks(predicted)
    return plan, ready.base, said


def packing_remarks(predicted: Prediction) -> Iterator[str]:
    """Yield what training several trials together is worth where `slots: auto` trains one at a time."""
    slots, gain = predicted.packed_slots, predicted.packing_gain
    if slots is None or gain is None:
        return
    if gain < WORTHWHILE_PACKING:
        yield f"packing {slots} trials would not be faster here ({gain:.1f} times)"
        return
    yield (
        f"packing {slots} trials would be {gain:.1f} times as fast here: run.slots: {slots}, or --slots "
        f"{slots}; losses are then the same within rounding, and not to the digit"
    )


def _cluster_remarks(file: RoundFile, where: Where) -> Iterator[str]:
    """Yield keys of the file about a cluster where it chooses no engine that uses one."""
    run = file.spec.run
    if where.engine is not None or run.engine not in ("local", "simulated"):
        return
    for key in ("ray_address", "resources_patience", "send_model_up_to"):
        if key in run.model_fields_set:
            yield (
                f"{file.path.name}:{file.line(f'run.{key}')}: run.{key} has no effect: the engine is "
                f"{run.engine}; write engine: ray, pass --engine ray, or remove this line"
            )


def _run_remarks(spec: RoundSpec, directory: Path) -> Iterator[str]:
    """Yield remarks on the sections `search` and `run`."""
    if spec.ends_early is not None:
        yield spec.ends_early
    if spec.trains_alone:
        yield spec.trains_alone
    if spec.run.notify:
        program = spec.run.notify[0]
        if shutil.which(str(directory / program) if "/" in program else program) is None:
            yield f"warning: run.notify: the program {program} was not found, so it will not be called"
    yield from spec.without_effect()
    yield from spec.doubtful_values()


def _continued_remarks(plan: StudyPlan) -> Iterator[str]:
    """Yield which enqueued trials name a trial to continue that the study does not have."""
    named = [entry["continues"] for entry in plan.spec.search.enqueue if "continues" in entry]
    folder = open_folder(plan.file.directory)
    if not named or plan.spec.run.engine == "simulated":
        return
    with opened(folder) as store:
        known = {
            f"{each.name}/{trial.number}"
            for each in store.rounds()
            for trial in store.trials(each.name, examples=False)
        }
    for name in named:
        if name not in known:
            yield f"search.enqueue: there is no trial {name} to continue, so the new one starts from step 0"


def _recorded_base(plan: StudyPlan, data: PreparedData) -> Evaluation | None:
    """Return the recorded evaluation of the base model on these evaluation rows, if any."""
    folder = open_folder(plan.file.directory)
    if not folder.has_begun:
        return None
    with opened(folder) as store:
        base = base_evaluation(store.trials(plan.name))
    same = base is not None and base.example_tokens == tuple(data.evaluation.num_targets.tolist())
    return base if same else None


def noise_remarks(
    base: Evaluation | None, *, num_examples: int, max_examples: int | None = None
) -> Iterator[str]:
    """Warn if there are too few evaluation rows to see small gains; `base` is None if not measured."""
    how = "raise evaluation.max_examples" if num_examples == max_examples else "hold out more rows"
    so = f"the report's conclusions depend on these rows: {how}"
    rows, most = count(num_examples, "evaluation row"), percent(MOST_NOISE)
    error = None if base is None else loss_error(base)
    if base is not None and error is not None and base.eval_loss > 0:
        share = error / base.eval_loss
        if share > MOST_NOISE:
            wanted = two_digits_up(num_examples * (share / MOST_NOISE) ** 2)
            yield (
                f"the standard error of the base model's loss is {percent(share)} with {rows}, and {so}; "
                f"about {wanted:,} rows would bring it to {most}"
            )
    elif num_examples < FEW_EXAMPLES:
        yield (
            f"with {rows} the standard error of the base model's loss is probably above {most} (--probe "
            f"measures it), and {so}"
        )


def two_digits_up(number: float) -> int:
    """Round up a number of at least 1 to two significant digits."""
    unit = int(10 ** max(0, math.floor(math.log10(number)) - 1))
    return math.ceil(number / unit) * unit


def _refuse_metric(plan: StudyPlan) -> None:
    """Raise RoundFileError if the source of the metric of answers shows that it is none."""
    if plan.absolute.evaluation.answers is None:
        return
    try:
        refuse_unlike_metric(plan.absolute.evaluation.answers.metric)
    except MetricError as error:
        said = str(error).removeprefix(f"{METRIC_KEY}: ")
        raise RoundFileError(
            plan.file.path, [Mistake(plan.file.line(METRIC_KEY), METRIC_KEY, said)]
        ) from error


def _answers(plan: StudyPlan, data: PreparedData) -> list[str]:
    """Yield remarks on generated answers: their number per trial, and completions that are too long."""
    answers = plan.spec.evaluation.answers
    if answers is None:
        return []
    purpose = "ranks the trials" if plan.spec.objective.metric == "answers" else "is shown beside the loss"
    remarks = [
        f"each complete trial answers {count(len(data.eval_prompts), 'evaluation row')} with up to "
        f"{answers.max_new_tokens} tokens; the score by {answers.metric} {purpose}"
    ]
    too_long = sum(eval_prompt.reference_tokens > answers.max_new_tokens for eval_prompt in data.eval_prompts)
    if too_long:
        remarks.append(
            f"{too_long} of their completions are longer than evaluation.answers.max_new_tokens "
            f"({answers.max_new_tokens}), so no answer can match them"
        )
    return remarks


def _with_unchecked(plan: RoundPlan, spec: RoundSpec, *, probe: bool) -> tuple[RoundPlan, list[str]]:
    """Return the plan with what was not checked, and a remark on it; `probe` checks everything."""
    unchecked = [] if probe else _unchecked(spec)
    if not unchecked:
        return plan, []
    remark = (
        f"not checked: {', '.join(unchecked)}; `tuner study check --probe` and `tuner study run` import and "
        "check what is not built in"
    )
    return replace(plan, unchecked=unchecked), [remark]


def _unchecked(spec: RoundSpec) -> list[str]:
    """Return the names that are not built in, and the hyperparameters that only they can define."""
    others: list[tuple[Kind, str]] = [
        ("sampler", spec.search.sampler),
        ("engine", spec.run.engine),
        *(("tracker", name) for name in spec.run.report_to),
    ]
    if spec.command is None:
        others.insert(1, ("metric", spec.objective.metric))
    foreign = sorted(spec.hyperparameters.keys() - HYPERPARAMETERS.keys()) if spec.unloaded else []
    methods = [name for _, name in spec.unloaded]
    answers = spec.evaluation.answers
    if answers is not None and answers.metric != EXACT_MATCH:
        methods.append(shown_metric(answers.metric))
    return [*methods, *foreign, *(name for kind, name in others if not is_built_in(kind, name))]


def _model_remarks(model: ModelSpec) -> Iterator[str]:
    """Yield remarks on a base model that can change, or that runs its own code."""
    if model.trust_remote_code:
        yield model.warning_of_code
    commit = loaded_commit(model)
    if commit is not None and model.revision != commit:
        yield f"the base model is {model.path} at commit {commit}; `revision: {commit}` under model pins it"


def _remarks(spec: RoundSpec, data: PreparedData) -> list[str]:
    """Return remarks on rows that are split, repeated or weighted."""
    remarks = data.report.left_out(spec.data.max_length)
    for name, split in data.report.splits.items():
        if split.pieces:
            remarks.append(f"{split.pieces} {name} rows continue a text longer than max_length")
        if split.duplicates:
            remarks.append(f"{split.duplicates} {name} rows repeat an earlier one")
    remarks += data.report.overlaps
    if len(data.report.mix) > 1:
        shares = ", ".join(f"{share:.1%} from {Path(path).name}" for path, share in data.report.mix.items())
        remarks.append(f"shares of the rows in an epoch: {shares}")
    return remarks


def _mistakes(error: InputError) -> tuple[Mistake, ...]:
    if isinstance(error, RoundFileError):
        return error.mistakes
    key = "data" if isinstance(error, DataError) else "model" if isinstance(error, ModelError) else ""
    return (Mistake(None, key, str(error)),)
