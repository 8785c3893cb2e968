"""What only a GPU shows, in parts that each end within eight minutes, gathered into one page.

    make gpu                                          every part, and what each will take
    make gpu PARTS='doctor equality-nf4'              some of them; the others stay on the page
    python -m benchmarks.gpu                          the same without make, which installs packages first
    python -m benchmarks.gpu --rehearse               on a CPU, with tiny shapes; the page goes to build/

Nothing needs a network, if tuner's packages and those of its extra `dev` are there: a model of SmolLM2's
shape with random weights takes its place.

Each part is a process of its own. The page is benchmarks/results/packing_CARD_DATE.md. A part that fails, or
takes too long, is on the page with what it said last, and the command exits with 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from ruamel.yaml import YAML

from benchmarks import packing
from tuner.config import RoundSpec

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 480
"""Of a part."""
_LAST_LINES = 60
_TUNER = [sys.executable, "-c", "from tuner.cli import main; main()"]


@dataclass(frozen=True)
class Outcome:
    """What a part found."""

    holds: bool
    text: str
    """Markdown."""


@dataclass(frozen=True)
class Part:
    """Something to run alone."""

    name: str
    minutes: float
    """That it will take, reckoned and not measured: loading and steps of the slowest cell on an H100."""
    says: str
    run: Callable[[bool], Outcome]
    """Given whether it is a rehearsal."""


# --- the parts ------------------------------------------------------------------------------------


def of_command(command: Sequence[str], *, directory: Path = ROOT) -> Outcome:
    """Run a command; it holds if it exits with 0."""
    ran = subprocess.run(
        command, cwd=directory, text=True, capture_output=True, check=False, env=environment()
    )
    said = (ran.stdout + ran.stderr).strip().splitlines()[-_LAST_LINES:]
    return Outcome(ran.returncode == 0, "\n".join(["```text", *said, "```"]))


def environment() -> dict[str, str]:
    """Return the variables of the processes: this tree first, and no long wait for a network."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "10"}


def doctor(_: bool) -> Outcome:
    """What tuner says of this machine."""
    return of_command([*_TUNER, "doctor"])


def gpu_tests(rehearse: bool) -> Outcome:
    """The tests that need a GPU; in a rehearsal they are found and skipped."""
    having = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    where = ["tests/gpu/test_gpu.py"] if rehearse else [str(path) for path in having]
    return of_command([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--timeout", "400", *where])


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of final losses, trial by trial."""

    alone: float
    """Of packed trials to each alone."""
    trainer: float
    """Of packed trials to PEFT and Trainer."""
    rounding: float
    """Of trials alone to the same in float32: what the dtype itself changes."""

    @property
    def tolerance(self) -> float:
        """Return twice the rounding, since both sides round; at least what float32 is held to."""
        return max(1e-3, 2 * self.rounding)

    @property
    def holds(self) -> bool:
        """Return whether packing changes no more than rounding does; false for NaN."""
        return self.alone <= self.tolerance and self.trainer <= self.tolerance

    def line(self, name: str) -> str:
        """A row of the table."""
        numbers = (self.alone, self.trainer, self.rounding, self.tolerance)
        return f"| {name} | " + " | ".join(f"{number:.1e}" for number in numbers) + " |"


def measure_differences(quantization: str, *, rehearse: bool) -> Differences:
    """Train four trials packed, alone, with PEFT and Trainer, and alone in float32."""
    cell = replace(packing.TINY, name=quantization, dtype="bfloat16", quantization=quantization, steps=50)
    if rehearse:
        cell = replace(small(cell), dtype="float32")
    trials = 2 if rehearse else 4
    with tempfile.TemporaryDirectory() as made:
        directory = packing.write_files(cell, Path(made))
        tokens = cell.micro_tokens
        packed, alone = (
            packing.by_tuner(cell, directory, trials=trials, slots=slots, micro_tokens=tokens).final_losses
            for slots in (trials, 1)
        )
        rows = packing.prepared_rows(cell, directory)
        reference = packing.by_trainer(cell, directory, trials=trials, rows=rows).final_losses
        exact = packing.by_tuner(
            replace(cell, dtype="float32"), directory, trials=trials, slots=1, micro_tokens=tokens
        ).final_losses
    return Differences(_apart(packed, alone), _apart(packed, reference), _apart(alone, exact))


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    found = [abs(a - b) / abs(b) for a, b in zip(some, others, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.nan


def equality(quantization: str) -> Callable[[bool], Outcome]:
    """Packed against alone and against PEFT and Trainer."""

    def run(rehearse: bool) -> Outcome:
        found = measure_differences(quantization, rehearse=rehearse)
        head = (
            "| base | packed to alone | packed to Trainer | to float32 | tolerance |\n|---|---|---|---|---|"
        )
        name = "float32" if rehearse else "bfloat16"
        return Outcome(found.holds, f"{head}\n{found.line(f'{name}, {quantization}')}")

    return run


def table(cell: packing.Cell, *trials: int) -> Callable[[bool], Outcome]:
    """The rows of one cell of benchmarks/packing.py; they stay on the page if the part is stopped."""

    def run(rehearse: bool) -> Outcome:
        counts = trials[:2] if rehearse else trials
        arguments = packing.parse_arguments(
            ["--repetitions", "1", "--trainer-trials", "1", "--trials", *map(str, counts)]
        )
        packing.keep_freed_memory()
        lines = packing.table_head()
        if rehearse and cell.attention != "torch":
            lines = [f"attention: {cell.attention} needs a GPU; rehearsed with torch's.", "", *lines]
        print("\n".join(lines), file=sys.stderr, flush=True)
        for line in packing.rows_of(small(cell) if rehearse else cell, arguments):
            lines.append(line)
            print(line, file=sys.stderr, flush=True)
        return Outcome(True, "\n".join(lines))

    return run


def small(cell: packing.Cell) -> packing.Cell:
    """The cell with a model and rows for a CPU: its precision, optimizer and kind of rows stay.

    Attention is torch's: no CPU has the other one.
    """
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 256}
    shape = packing.TINY.shape | narrow
    short = {"steps": 6, "evaluation_rows": 8, "evaluate_every": 6, "accumulation": 2}
    tokens = 96 if cell.is_alpaca else 16
    return replace(
        cell, shape=shape, tokens=tokens, batch_sizes=cell.batch_sizes[:2], attention="torch", **short
    )


def smollm2(rehearse: bool) -> Outcome:
    """A round of the study alpaca-smollm2 in bfloat16; in a rehearsal of the quickstart."""
    study = ROOT / "studies" / ("quickstart" if rehearse else "alpaca-smollm2")
    said = ""
    if not (study / "base").exists():
        made = of_command([sys.executable, str(study / "prepare.py")])
        if not made.holds:
            said = "The model could not be made (`make smollm2`): random weights of its shape.\n\n"
    with tempfile.TemporaryDirectory() as directory:
        write_round(study, Path(directory), rehearse=rehearse, is_stand_in=bool(said))
        ran = of_command([*_TUNER, "-C", directory, "study", "run", "round1.yaml"])
    return replace(ran, text=said + ran.text)


def write_round(study: Path, directory: Path, *, rehearse: bool, is_stand_in: bool = False) -> None:
    """Write a study's first round into another folder, for this machine.

    A stand-in has a model of SmolLM2's shape with random weights, and rows of Alpaca's lengths.
    """
    document = YAML(typ="safe").load((study / "round1.yaml").read_text())
    if is_stand_in:
        packing.write_files(
            replace(packing.SMOLLM2, dtype="bfloat16", tokens=128, is_alpaca=True, evaluation_rows=32),
            directory,
        )
        document["model"]["path"] = "base"
        document["data"] |= {"loss_on": "all"}
        for name in ("train", "eval"):
            document["data"][name] = [{"path": f"{name}.jsonl", "format": "text"}]
    else:
        spec = RoundSpec.model_validate(document).absolute(study.resolve())
        document["model"]["path"] = spec.model.path
        for name in ("train", "eval"):
            for source, found in zip(document["data"][name], getattr(spec.data, name), strict=True):
                source["path"] = found.path
    document["storage"] = f"sqlite:///{directory}/tuner.db"
    if rehearse:
        document["max_train_steps"] = 4
        document["hyperparameters"] |= {"warmup_steps": 1, "decay_steps": 1}
        document["evaluation"] = {"every_steps": 4, "max_examples": 4}
        document["search"]["trials"] = 2
        document["run"] = {"engine": "local"}
    else:
        document["model"]["dtype"] = "bfloat16"
    with (directory / "round1.yaml").open("w") as file:
        YAML(typ="safe").dump(document, file)


def parts() -> dict[str, Part]:
    """Every part by name, in the order of the page."""
    made = [
        Part("doctor", 0.5, "what tuner says of this machine", doctor),
        Part("tests", 4, "pytest -m gpu", gpu_tests),
        Part("equality-bf16", 3, "packed is alone, and PEFT with Trainer: bfloat16", equality("none")),
        Part("equality-nf4", 3, "the same over a base in NF4", equality("nf4")),
    ]
    for cell in packing.gpu_cells():
        minutes, counts = (4, (1, 2, 4, 8, 16)) if cell.name == "1B" else (6, (1, 4, 16))
        # Past 16,384 tokens a pass is full on every card, and eight minutes are over.
        fitting = [count for count in counts if count * cell.micro_tokens <= 16_384]
        says = f"K = 1 to {fitting[-1]} beside the limit, {cell.micro_tokens} tokens a micro-step"
        name = f"packing-{cell.name}-{cell.micro_tokens}"
        made.append(Part(name, minutes, says, table(cell, *fitting)))
    base = packing.gpu_cells()[0]
    for cell in (*packing.real_cells(base), packing.varlen_cell(base)):
        _, _, what = cell.name.partition(", ")
        name = f"real-{what or 'lengths'}".replace(" ", "-")
        made.append(Part(name, 5, f"K = 8, Alpaca's lengths, {what or 'nothing else'}", table(cell, 8)))
    made.append(Part("smollm2", 6, "a round of the study alpaca-smollm2", smollm2))
    return {part.name: part for part in made}


# --- the page -------------------------------------------------------------------------------------


def page(card: str, found: dict[str, dict[str, object]]) -> str:
    """The parts that ran, each with its result."""
    versions = ", ".join(
        f"{name} {sys.modules[name].__version__}" for name in ("torch", "transformers", "peft")
    )
    lines = [f"# Packing on {card}", "", f"{versions}. Every number was measured by this command:", ""]
    lines += ["    make gpu", "", "| part | result | minutes |", "|---|---|---|"]
    for name, part in found.items():
        result = "holds" if part["holds"] else "**does not hold**"
        lines.append(f"| [{name}](#{name}) | {result} | {float(str(part['seconds'])) / 60:.1f} |")
    for name, part in found.items():
        lines += ["", f"## {name}", "", str(part["text"])]
    return "\n".join(lines) + "\n"


def run_apart(part: Part, *, rehearse: bool, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """Run a part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", part.name, "--here"]
    try:
        ran = subprocess.run(
            [*command, *(["--rehearse"] if rehearse else [])],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
            timeout=limit_seconds,
            env=environment(),
        )
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stderr or b"").decode(errors="replace").splitlines()  # bytes, `text` or not
        rows = [line for line in said if line.startswith("|")]
        return Outcome(False, "\n".join([f"Stopped after {limit_seconds / 60:.0f} minutes.", "", *rows]))
    if ran.returncode:
        last = ran.stderr.strip().splitlines()[-_LAST_LINES:]
        return Outcome(False, "\n".join(["```text", *last, "```"]))
    return Outcome(**json.loads(ran.stdout.splitlines()[-1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run parts, write the page after each; 1 if one does not hold."""
    known = parts()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--list", action="store_true", help="say what each part is and will take")
    parser.add_argument(
        "--here", action="store_true", help="run one part in this process and print it as JSON"
    )
    parser.add_argument("--out", type=Path, help="a folder for the page and for what earlier parts found")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts if name not in known]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = [known[name] for name in arguments.parts or known]
    if arguments.list:
        print("\n".join(f"{part.name:22} about {part.minutes:g} min  {part.says}" for part in chosen))
        return 0
    if not torch.cuda.is_available() and not arguments.rehearse:
        parser.error(
            "no CUDA GPU: torch.cuda.is_available() is False. Run it on a machine with a GPU; on this one, "
            "`python -m benchmarks.gpu --rehearse` runs the same parts with tiny shapes."
        )
    if arguments.here:
        (part,) = chosen
        print(json.dumps(asdict(part.run(arguments.rehearse))))
        return 0
    return _run(chosen, rehearse=arguments.rehearse, out=arguments.out)


def _run(chosen: Sequence[Part], *, rehearse: bool, out: Path | None) -> int:
    card = "a CPU, rehearsed" if rehearse else torch.cuda.get_device_name()
    kept = (out or ROOT / "build") / f"gpu_{_word(card)}.json"
    written = out or (ROOT / "build" if rehearse else ROOT / "benchmarks" / "results")
    path = written / f"packing_{_word(card)}_{time.strftime('%Y-%m-%d')}.md"
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    print(f"{card}: {len(chosen)} parts, about {sum(part.minutes for part in chosen):g} minutes", flush=True)
    for part in chosen:
        print(f"{part.name}: {part.says}, about {part.minutes:g} min", flush=True)
        begun = time.monotonic()
        outcome = run_apart(part, rehearse=rehearse)
        found[part.name] = asdict(outcome) | {"seconds": time.monotonic() - begun}
        found = {name: found[name] for name in parts() if name in found}
        kept.write_text(json.dumps(found))
        path.write_text(page(card, found))
        if not outcome.holds:
            print(outcome.text, flush=True)
    print(f"wrote {path}")
    return int(not all(found[part.name]["holds"] for part in chosen))


def _word(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


if __name__ == "__main__":
    raise SystemExit(main())
