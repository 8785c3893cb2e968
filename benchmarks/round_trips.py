"""Large files through `study check`, a short round, export and plain PEFT: time, memory, equal loss.

    OMP_NUM_THREADS=1 python benchmarks/round_trips.py DIR --megabytes 25 100 --alpaca FILE.json
    OMP_NUM_THREADS=1 python benchmarks/round_trips.py DIR --formats messages --megabytes 1000 --only-check

DIR keeps files and studies. The base is that of studies/quickstart. Files are generated: texts of varied
lengths, characters of many scripts, one row in a hundred twice. Each command runs in a process of its
own; seconds are those of the processor, of the command and its worker together. Memory is what a process
allocates (RssAnon), sampled; pages of mapped files are not in it, since the kernel takes them back when
it needs them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "studies" / "quickstart" / "base"
_SAMPLED_EVERY_SECONDS = 0.02
_ROUND = """\
study: round-trip
round: round1
model: {{path: {base}, dtype: float32}}
data:
  train: [{{path: {file}, {source}}}]
  eval_fraction: {eval_fraction}
  max_length: 128
max_train_steps: 6
hyperparameters:
  learning_rate: {{low: 1e-3, high: 1e-2, log: true}}
  lora_r: 4
  batch_size: 8
  optimizer: adamw
  warmup_steps: 1
  decay_steps: 2
search: {{trials: 2}}
evaluation: {{every_steps: 3, batch_size: 16, max_examples: 32}}
"""


# --- texts ----------------------------------------------------------------------------------------

_SYLLABLES = [first + last for first in "bdfghklmnprstv" for last in "aeiou"]
_RARE = [
    "naïve",
    "Zürich",
    "señor",
    "Łódź",
    "αβγ",
    "привет",
    "你好",
    "世界",
    "日本語",
    "مرحبا",
    "ไทย",
    "😀",
    "👩‍💻",
]
_RARE += ["–", "“so”", "x_1", "3.14", "def f():", "<b>", "\\n", "{", "|"]


class Texts:
    """Sentences that look like language: few words are frequent, most are rare, some are in other scripts."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        words = ["".join(self._random.choices(_SYLLABLES, k=self._random.randint(1, 4))) for _ in range(8000)]
        words[50::40] = [self._random.choice(_RARE) for _ in words[50::40]]
        weights = [1 / (rank + 2) for rank in range(len(words))]
        self._sentences = [
            " ".join(self._random.choices(words, weights, k=self._random.randint(3, 25))).capitalize() + ". "
            for _ in range(20_000)
        ]

    def text(self, most_sentences: int) -> str:
        """Up to so many sentences; short ones are more frequent."""
        count = 1 + int(most_sentences * self._random.random() ** 3)
        return "".join(self._random.choices(self._sentences, k=count)).strip()

    def repeated(self, rows: Callable[[], Any]) -> Iterator[Any]:
        """Rows without end, one in a hundred of them twice."""
        while True:
            row = rows()
            yield row
            if self._random.random() < 0.01:
                yield row

    def draw(self, most: int) -> int:
        """An integer below that."""
        return self._random.randrange(most)


def write_messages(texts: Texts, stream: IO[str], num_bytes: int) -> None:
    """Conversations of one to four questions, one a line."""

    def row() -> dict[str, Any]:
        roles = ["user", "assistant"] * (1 + texts.draw(4))
        return {"messages": [{"role": role, "content": texts.text(8)} for role in roles]}

    _write_lines(texts.repeated(row), stream, num_bytes)


def write_sharegpt(texts: Texts, stream: IO[str], num_bytes: int) -> None:
    """One JSON list of conversations."""

    def row() -> dict[str, Any]:
        speakers = ["human", "gpt"] * (1 + texts.draw(4))
        return {"conversations": [{"from": who, "value": texts.text(8)} for who in speakers]}

    stream.write("[\n")
    for number, value in enumerate(texts.repeated(row)):
        if stream.tell() > num_bytes:
            break
        stream.write((",\n" if number else "") + json.dumps(value, ensure_ascii=False))
    stream.write("\n]\n")


def write_completion(texts: Texts, stream: IO[str], num_bytes: int) -> None:
    """CSV with quotes and line ends within fields."""
    table = csv.writer(stream)
    table.writerow(("prompt", "completion"))
    rows = texts.repeated(lambda: (texts.text(6) + "\n", " " + texts.text(12).replace(". ", ".\n", 1)))
    while stream.tell() < num_bytes:
        table.writerow(next(rows))


def write_log(texts: Texts, stream: IO[str], num_bytes: int) -> None:
    """Lines with a time, and now and then a trace of many."""
    seconds = 0
    levels = ("INFO", "INFO", "INFO", "DEBUG", "WARN")

    def line() -> str:
        nonlocal seconds
        seconds += texts.draw(3)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_700_000_000 + seconds))
        if texts.draw(500) == 0:
            trace = "".join(f"  at module_{texts.draw(40)}.call:{texts.draw(900)}\n" for _ in range(30))
            return f"{stamp} ERROR [worker-{texts.draw(8)}] {texts.text(2)}\n{trace}"
        level, worker = levels[texts.draw(5)], texts.draw(8)
        return f"{stamp} {level} [worker-{worker}] {texts.draw(90_000)} {texts.text(2)}\n"

    while stream.tell() < num_bytes:
        stream.write("".join(line() for _ in range(200)))


def _write_lines(rows: Iterator[Any], stream: IO[str], num_bytes: int) -> None:
    while stream.tell() < num_bytes:
        stream.write(json.dumps(next(rows), ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Format:
    """How a file is made, and how the round file says it is read."""

    file: str
    source: str
    write: Callable[[Texts, IO[str], int], None]


FORMATS = {
    "messages": Format("rows.jsonl", "format: messages", write_messages),
    "sharegpt": Format("rows.json", "format: sharegpt, template: chatml", write_sharegpt),
    "completion": Format("rows.csv", "format: completion", write_completion),
    "log": Format("app.log", "format: text, split_on: line, group_records: fill", write_log),
}


def generated(how: Format, path: Path, num_bytes: int) -> None:
    """Write the file, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8", newline="") as stream:
            how.write(Texts(0), stream, num_bytes)
        unfinished.rename(path)


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What a command took."""

    seconds: float = 0.0
    """Of the processor."""
    elapsed_seconds: float = 0.0
    own_mb: float = 0.0
    """Most memory that the command itself allocated."""
    worker_mb: float = 0.0
    """Most memory of a process that it started."""
    output: str = ""


def measured(command: Sequence[str], directory: Path) -> Measured:
    """Run a command in its own process. Raises RuntimeError when it fails."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    result = Measured()
    watch = threading.Thread(target=_watch, args=(process, result))
    watch.start()
    result.output, errors = process.communicate()
    watch.join()
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}\n{result.output}{errors}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result.elapsed_seconds = time.monotonic() - begun
    return result


def _watch(process: subprocess.Popen[str], result: Measured) -> None:
    while process.poll() is None:
        result.own_mb = max(result.own_mb, _allocated_mb(process.pid))
        for child in _children(process.pid):
            result.worker_mb = max(result.worker_mb, _allocated_mb(child))
        time.sleep(_SAMPLED_EVERY_SECONDS)


def _allocated_mb(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(found[0]) / 1024 if found else 0.0


def _children(process: int) -> list[int]:
    try:
        named = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    direct = [int(child) for child in named]
    return direct + [grandchild for child in direct for grandchild in _children(child)]


# --- the round trip -------------------------------------------------------------------------------


def tuner(*arguments: str) -> list[str]:
    """A command of the command line."""
    return [sys.executable, "-m", "tuner.cli", *arguments]


def round_trip(study: Path, file: Path, source: str, *, only_check: bool) -> Iterator[tuple[str, Measured]]:
    """Each step's name, and what it took. `study` is a new directory."""
    study.mkdir(parents=True)
    eval_fraction = 0.05 if file.stat().st_size < 10_000_000 else 0.005
    (study / "round1.yaml").write_text(
        _ROUND.format(base=BASE, file=file, source=source, eval_fraction=eval_fraction)
    )
    yield "check", measured(tuner("study", "check", "round1.yaml", "--json"), study)
    yield "check again", measured(tuner("study", "check", "round1.yaml", "--json"), study)
    if only_check:
        return
    yield "run", measured(tuner("study", "run", "round1.yaml"), study)
    yield "export", measured(tuner("trial", "export", "best", "--to", "adapter"), study)
    yield "reload", measured([sys.executable, __file__, "--reload", str(study)], study)


def reload(study: Path) -> None:
    """Print, as JSON, the recorded loss and that of the exported adapter in plain PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuner.api.export import finished_trial
    from tuner.data import prepare
    from tuner.study.folder import open_folder

    finished = finished_trial(open_folder(study), "best")
    best = min(finished.trial.evaluations, key=lambda evaluation: evaluation.eval_loss)
    rows = prepare(finished.spec, AutoTokenizer.from_pretrained(BASE), study / ".tuner-cache").evaluation
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, study / "adapter").eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, seen = torch.from_numpy(row.input_ids).long(), torch.from_numpy(row.is_target[1:])
            logits = model(ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits[seen], ids[1:][seen], reduction="sum"))
            targets += int(seen.sum())
    print(json.dumps({"recorded": best.eval_loss, "reloaded": total / targets, "examples": len(rows)}))


def main() -> None:
    """Run what the command line asks for, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 100])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--alpaca", type=Path, help="an Alpaca file to take too, as it is")
    parser.add_argument("--only-check", action="store_true")
    asked = parser.parse_args()
    print("| file | MB | step | processor s | elapsed s | MB of the command | MB of its worker | result |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    trips = [("alpaca", asked.alpaca.resolve(), "format: alpaca")] if asked.alpaca else []
    for name in asked.formats:
        for megabytes in asked.megabytes:
            file = (asked.directory / f"{megabytes}" / FORMATS[name].file).resolve()
            generated(FORMATS[name], file, megabytes * 1_000_000)
            trips.append((name, file, FORMATS[name].source))
    for name, file, source in trips:
        megabytes = file.stat().st_size / 1e6
        study = asked.directory / f"{name}-{megabytes:.0f}-{os.getpid()}"
        for step, took in round_trip(study.resolve(), file, source, only_check=asked.only_check):
            result = _result(step, took.output)
            cells = [name, f"{megabytes:.0f}", step, f"{took.seconds:.1f}", f"{took.elapsed_seconds:.1f}"]
            cells += [f"{took.own_mb:.0f}", f"{took.worker_mb:.0f}" if took.worker_mb else "", result]
            print("| " + " | ".join(cells) + " |", flush=True)


def _result(step: str, output: str) -> str:
    match step:
        case "check":
            plan = json.loads(output)["plan"]
            return f"{plan['train_rows']:,} rows"
        case "reload":
            found = json.loads(output)
            return f"{found['recorded']:.6f} recorded, {found['reloaded']:.6f} reloaded"
    return ""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reload"]:
        reload(Path(sys.argv[2]))
    else:
        main()
