"""`python -m tuner.training`: one worker process, told by its parent on standard input what to do.

Standard output carries events alone, one JSON document a line; whatever libraries print goes to
standard error, which the parent keeps as the worker's log.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tuner.adapters import Base, Pack, load_base
from tuner.adapters.initial import hollow_copy, targeted_modules, values_of
from tuner.data import PreparedData, load_tokenizer, prepare
from tuner.errors import InputError, ModelError, TunerError
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    Died,
    Evaluation,
    Event,
    Ready,
    evaluation_from_json,
    event_to_json,
)
from tuner.spec import RoundSpec
from tuner.training.inbox import Inbox
from tuner.training.loop import PASS_TOKENS, Workplace, example_nll, train

SLOTS = {"cpu": 1, "cuda": 4}
"""What `slots: auto` means on each kind of device."""
_CONFIG_OF_THE_FILES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
"""Keys of a model's configuration that say where it lies, not what it is."""


def main() -> int:
    """Set up, say `Ready`, train until told to close."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)

    def say(event: Event) -> None:
        events.write(json.dumps(event_to_json(event)) + "\n")
        events.flush()

    inbox = Inbox(sys.stdin)
    document = inbox.read_document()
    with Path(document["lock"]).open("w") as lock:
        # A predecessor that lost its parent may still be ending: two workers never write one folder.
        fcntl.flock(lock, fcntl.LOCK_EX)
        inbox.listen()
        try:
            place, ready = _set_up(document)
        except TunerError as error:
            say(Died(str(error), is_input_error=isinstance(error, InputError)))
            return 1
        say(ready)
        train(place, inbox, say)
    return 0


def _set_up(document: dict[str, Any]) -> tuple[Workplace, Ready]:
    """Load base and data once; measure the untouched base unless the parent already knows."""
    spec = RoundSpec.model_validate(document["spec"])
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    slots = SLOTS[device.type] if document["slots"] == "auto" else int(document["slots"])
    if document.get("threads"):
        torch.set_num_threads(int(document["threads"]))
    if any(values_of(spec.space()["use_dora"])):
        raise ModelError("hyperparameters.use_dora: this version trains plain LoRA; leave it false")
    tokenizer = load_tokenizer(spec.model)
    data = prepare(spec, tokenizer, Path(document["cache"]))
    base = load_base(spec.model, device=device, max_length=spec.data.max_length)
    workload = _workload(base, data, spec)
    hollow = hollow_copy(base, base_path=spec.model.path)
    space = spec.space()
    place = Workplace(
        base=base,
        hollow=hollow,
        pack=Pack(
            base,
            num_slots=slots,
            max_rank=int(max(values_of(space["lora_r"]))),
            modules=targeted_modules(hollow, space),
        ),
        train=data.train,
        evaluation=data.evaluation,
        base_path=spec.model.path,
        revision=spec.model.revision,
        evaluation_rows=spec.evaluation.batch_size,
        micro_tokens=max(1, PASS_TOKENS[device.type] // slots),
    )
    known = document.get("base")
    place.base_evaluation = evaluation_from_json(known) if known else _measure_base(place)
    ready = Ready(
        slots=slots,
        device=str(device),
        base=place.base_evaluation,
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        workload=workload,
        evaluation_share=_evaluation_share(data, spec),
    )
    return place, ready


def _workload(base: Base, data: PreparedData, spec: RoundSpec) -> str:
    """Fingerprint of what is held fixed: the base's configuration and a sample of its weights; the data."""
    total = hashlib.sha256(data.fingerprint.encode())
    config = {k: v for k, v in base.model.config.to_dict().items() if k not in _CONFIG_OF_THE_FILES}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    total.update(f"{spec.model.dtype} {spec.model.quantization} {spec.data.max_length}".encode())
    for name, parameter in base.model.named_parameters():
        sample = parameter.detach().reshape(-1)[:1024].cpu().contiguous().view(torch.uint8)
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()


def _evaluation_share(data: PreparedData, spec: RoundSpec) -> float:
    """Share of a trial's work that its evaluations take: a token costs half of one that is trained on."""
    space = spec.space()
    sizes = values_of(space["batch_size"])
    batch_size = sum(sizes) / len(sizes)
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    evaluated = evaluations * float(data.evaluation.num_tokens.sum())
    trained = 2.0 * spec.max_train_steps * batch_size * float(data.train.num_tokens.mean())
    return float(evaluated / (evaluated + trained))


def _measure_base(place: Workplace) -> Evaluation:
    sums = example_nll(place, ())[0]
    tokens = place.evaluation.num_targets.tolist()
    return Evaluation(0, sum(sums) / sum(tokens), example_nll=tuple(sums), example_tokens=tuple(tokens))


if __name__ == "__main__":
    sys.exit(main())
