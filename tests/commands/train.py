"""A training script of one's own: gradient descent on a noisy quadratic, with momentum and a checkpoint.

Options choose faults for the tests. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.5)
parser.add_argument("--schedule", default="constant")
parser.add_argument("--decay_steps", type=int, default=0)
parser.add_argument("--training_seed", type=int, default=0)
parser.add_argument("--resume")
parser.add_argument("--fault", default="")
parser.add_argument("--pause", type=float, default=0.0)
options = parser.parse_args()

horizon = int(os.environ.get("TUNER_MAX_STEPS", "24"))
every = int(os.environ.get("TUNER_EVALUATE_EVERY", "4"))
keep = {int(step) for step in os.environ.get("TUNER_SAVE_STEPS", "").split(",") if step}
output = Path(os.environ.get("TUNER_OUTPUT_DIR", "out"))


def report(step: int, **values: object) -> None:
    if "TUNER_METRICS" in os.environ and options.fault != "silent":
        with Path(os.environ["TUNER_METRICS"]).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def rate(step: int) -> float:
    left = (horizon - step) / options.decay_steps if options.decay_steps else 1.0
    return options.learning_rate * min(1.0, left)


def noise(step: int) -> float:
    return random.Random(f"{options.training_seed} {step}").gauss(0, 0.05)


def loss(x: float) -> float:
    return 1.0 + x * x


def save(step: int) -> None:
    place = output / f"step-{step}"
    if options.fault == "elsewhere":
        place = Path(__file__).parent / "shared" / f"step-{step}"
    if options.fault == "linked":
        shared = Path(__file__).parent / "shared"
        shared.mkdir(exist_ok=True)
        output.mkdir(exist_ok=True)
        place.symlink_to(shared)
    place.mkdir(parents=True, exist_ok=True)
    (place / "state.json").write_text(json.dumps({"x": x, "v": v, "step": step}))
    report(step, checkpoint=str(place))


x, v, start = 2.0, 0.0, 0
if options.resume and options.fault != "starts over":
    state = json.loads((Path(options.resume) / "state.json").read_text())
    x, v, start = state["x"], state["v"], state["step"]
if start == 0:
    report(0, eval_loss=loss(x), accuracy=0.0)
if options.fault == "crash":
    sys.exit("ImportError: no such thing")
for step in range(start, horizon if options.fault != "too long" else horizon + 5):
    time.sleep(options.pause)
    if options.fault == "out of memory" and step == 6:
        sys.exit("torch.OutOfMemoryError: CUDA out of memory")
    if options.fault == "port" and step == 6:
        sys.exit("EADDRINUSE: 29500")
    if options.fault == "hangs" and step == 6:
        time.sleep(600)
    if options.fault == "early" and step == 9:
        sys.exit(0)
    gradient = 2 * x + noise(step)
    v = options.momentum * v + gradient
    x -= rate(step) * v
    done = step + 1
    if done % every == 0 or done == horizon or done in keep:
        value = math.nan if options.fault == "nan" and done > 6 else loss(x)
        report(done, eval_loss=value, train_loss=loss(x), learning_rate=rate(step), accuracy=1 / loss(x))
        save(done)
