"""Make preference pairs from the quickstart's instructions: the right answer against another row's.

Run from the repository's root: `python studies/dpo-trl/prepare.py`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

HERE = Path(__file__).parent
DATA = HERE.parent / "quickstart" / "data"
ROWS = {"train": ("train.jsonl", 160), "test": ("eval.jsonl", 64)}


def pairs(path: Path, count: int) -> list[dict[str, str]]:
    """Return the first rows, each with the answer of the row after it as the rejected one."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][: count + 1]
    return [
        {
            "prompt": f"{row['instruction']} {row.get('input', '')}".strip() + "\n",
            "chosen": row["output"],
            "rejected": other["output"],
        }
        for row, other in itertools.pairwise(rows)
        if row["output"] != other["output"]
    ]


def main() -> None:
    """Write `rows/train.jsonl` and `rows/test.jsonl`."""
    for name, (source, count) in ROWS.items():
        lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs(DATA / source, count)]
        (HERE / "rows").mkdir(exist_ok=True)
        (HERE / "rows" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
