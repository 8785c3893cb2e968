"""Report what Hugging Face's Trainer evaluates and saves to the file `TUNER_METRICS`, as JSON lines.

Python imports this module at its start, since its folder is on PYTHONPATH of a trial's command. It needs the
standard library of Python 3.8 and loads nothing else before `transformers.trainer` is imported.
"""

import importlib.machinery
import importlib.util
import json
import os
import random
import sys

_TRAINER = "transformers.trainer"


def _write(line):
    with open(os.environ["TUNER_METRICS"], "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(json.dumps(line) + "\n")


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _RandomState:
    """The state of all random generators, which an evaluation may advance."""

    def __init__(self):
        import numpy as np
        import torch

        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def restore(self):
        import numpy as np
        import torch

        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)


def _callback(trainer):
    """Return the callback class, which is made once transformers is there."""

    class TunerCallback(trainer.TrainerCallback):
        """Asks for tuner's evaluations and checkpoints, and reports them.

        Training does not depend on the evaluations: the random state is put back after each.
        """

        def __init__(self):
            self.evaluated = {}
            self.is_over = False
            self.before = None
            steps = os.environ.get("TUNER_SAVE_STEPS", "")
            self.save_steps = {int(step) for step in steps.split(",") if step}

        def on_train_begin(self, args, state, control, **_):
            args.eval_on_start = state.global_step == 0 and os.environ.get("TUNER_EVALUATE_AT_START") == "1"
            self.before = _RandomState()
            if state.is_world_process_zero:
                _write({"began_at": state.global_step, "max_steps": state.max_steps})

        def on_step_end(self, args, state, control, **_):
            if state.global_step in self.save_steps:
                control.should_log = control.should_evaluate = control.should_save = True
            self.before = _RandomState() if control.should_evaluate else None
            return control

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero and not self.is_over and logs and "loss" in logs:
                line = {"step": state.global_step, "train_loss": logs["loss"]}
                if "learning_rate" in logs:
                    line["learning_rate"] = logs["learning_rate"]
                _write(line)

        def on_evaluate(self, args, state, control, metrics=None, **_):
            if self.before is not None:
                self.before.restore()
            known = self.evaluated.setdefault(state.global_step, set())
            found = {name: value for name, value in (metrics or {}).items() if _number(value)}
            is_first = any(name not in known for name in found)  # each of several evaluation sets has its own
            known.update(found)
            if state.is_world_process_zero and is_first and not self.is_over:
                _write({"step": state.global_step, **found})

        def on_save(self, args, state, control, **_):
            if state.is_world_process_zero and not self.is_over:
                place = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")  # noqa: PTH118
                _write({"step": state.global_step, "checkpoint": place, "processes": args.world_size})

        def on_train_end(self, args, state, control, **_):
            self.is_over = True

    return TunerCallback


def _resuming(train):
    """Return `Trainer.train`, which resumes from the trial's checkpoint if the script names none."""

    def train_or_resume(self, resume_from_checkpoint=None, *positional, **named):
        place = os.environ.get("TUNER_RESUME_FROM")
        if place and not resume_from_checkpoint:
            resume_from_checkpoint = place
        return train(self, resume_from_checkpoint, *positional, **named)

    return train_or_resume


class _Loader:
    """The loader of `transformers.trainer`, which adds the callback when the module is there."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        module.DEFAULT_CALLBACKS.append(_callback(module))
        module.Trainer.train = _resuming(module.Trainer.train)


class _Finder:
    """Finds `transformers.trainer` once, and leaves the way of imports as it was."""

    def find_spec(self, name, path=None, target=None):
        if name != _TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _load_next():
    """Load the sitecustomize that this one hides, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    others = [place for place in sys.path if os.path.abspath(place) != here]  # noqa: PTH100
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("TUNER_METRICS"):
    sys.meta_path.insert(0, _Finder())
_load_next()
