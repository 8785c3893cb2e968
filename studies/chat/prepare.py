"""Make rows/ from the instructions of studies/quickstart: conversations with a system prompt.

Each is a system prompt, one or two turns of the user, and the answers. `python studies/chat/prepare.py`
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SYSTEM = "You live in the valley. Answer shortly."


def conversations(path: Path, *, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of one or two of the instructions without an input."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    turns = [(row["instruction"], row["output"]) for row in rows if not row["input"]]
    draw = random.Random(seed)
    draw.shuffle(turns)
    while turns:
        taken, turns = turns[: 1 + draw.randrange(2)], turns[2:]
        messages = [{"role": "system", "content": SYSTEM}]
        for question, answer in taken:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages


def main() -> None:
    """Write both files."""
    (HERE / "rows").mkdir(exist_ok=True)
    for name, most in (("train", 120), ("eval", 24)):
        source = HERE.parent / "quickstart" / "data" / f"{name}.jsonl"
        made = list(conversations(source, seed=0))[:most]
        lines = [json.dumps({"messages": messages}) for messages in made]
        (HERE / "rows" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
