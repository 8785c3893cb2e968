"""What tuner says of a horizon, against real runs that were trained longer.

    python benchmarks/horizons.py [DATA] [--output FILE]

DATA is a gzipped JSON list of runs: `data`, `layers`, `width`, `learning_rate`, `schedule`, `decay_share`,
`max_train_steps`, `decay_begins`, `warmup_steps`, `batch_size`, `weight_decay`, `seed`, `data_seed`,
`first_step` and `curve`, the [step, validation loss] of its evaluations. Runs that agree in all but schedule,
share and horizon are a family. The shorter of two runs of a family is read as a round, and the longer one is
the answer: what it gained, against what was predicted, and whether it was right to stop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from longer.cases import cases
from longer.outcomes import judge
from longer.runs import UnreadableRuns, load_runs
from longer.summary import markdown

DEFAULT_DATA = Path("../shared/data/horizons/llama_runs.json.gz")


def main() -> int:
    arguments = _arguments()
    try:
        runs = load_runs(arguments.data)
    except UnreadableRuns as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = [judge(case) for case in cases(runs.runs)]
    text = markdown(outcomes, command=f"python benchmarks/horizons.py {arguments.data}", runs=runs)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", metavar="DATA", nargs="?", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the Markdown there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
