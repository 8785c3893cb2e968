"""Files with seeded damage: of round files by lines, values and characters, of data files by bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HOSTILE = (
    "",
    "~",
    "[]",
    "{}",
    "-1",
    "0",
    "1e999",
    "-.inf",
    ".nan",
    "9" * 400,
    "0x" + "f" * 300,
    "1:2:3",
    "2026-99-99",
    "2026-11-28",
    "2026-11-28T25:61:61",
    "!!bool maybe",
    "!!int x",
    "!!binary '='",
    "!!timestamp x",
    "!!python/object/apply:os.system [true]",
    "!!set {a}",
    "!!omap [a: 1]",
    "!unknown {a: b}",
    "? [a, b]",
    "{[a, b]: c}",
    "{{a: b}: c}",
    "&a [*a]",
    "*unknown",
    "[&x [1, 1], *x, *x]",
    "{<<: 1}",
    "{<<: [1, 2]}",
    '"\\ud800"',
    '"\\x00"',
    "'unclosed",
    '"unclosed',
    "|\n  text",
    ">-\n\n",
    "[" * 300 + "]" * 300,
    "{a: " * 200 + "}" * 200,
    "- " * 200 + "a",
    "true",
    "null",
    "text: with: colons",
    "../../../../etc/passwd",
    "/dev/zero",
    "~root/x",
    "%(here)s {x} $HOME",
    "\u202e\u0000"[:1],
    "'" + "x" * 10_000 + "'",
    "[" + ", ".join(["1e-4"] * 500) + "]",
    "{low: 1, high: 0}",
    "{low: -1, high: 1, log: true}",
    "{low: 1e-400, high: 1e400, log: true}",
    "{low: 1}",
    "[[1], [2]]",
    "[1, a, null, {b: c}]",
)
"""Values that have ended in a traceback somewhere, or might."""


def bomb(levels: int) -> str:
    """A kilobyte that stands for 9 ** levels values."""
    lines = ['x0: &x0 ["a", "a", "a", "a", "a", "a", "a", "a", "a"]']
    lines += [f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 9)}]" for level in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


def mutated_round(text: str, seed: int) -> bytes:
    """A round file after one to three changes."""
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 3)):
        text = dice.choice(_ROUND_CHANGES)(text, dice)
    content = text.encode(errors="surrogateescape")
    return mutated_bytes(content, dice.randrange(2**32)) if dice.random() < 0.1 else content


def mutated_bytes(content: bytes, seed: int) -> bytes:
    """A file after one to four changes of bytes."""
    dice = random.Random(seed)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content) + 1)
        length = dice.choice((1, 1, 4, 64, 1000))
        match dice.randrange(5):
            case 0:
                content = content[:at] + dice.randbytes(length) + content[at + length :]
            case 1:
                content = content[:at] + content[at + length :]
            case 2:
                content = content[:at] + content[at : at + length] * dice.randint(2, 20) + content[at:]
            case 3:
                content = content[:at]
            case _:
                content = content[:at] + dice.choice(_SNIPPETS) + content[at:]
    return content


_ROW_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1.5,
    10**400,
    float("nan"),
    "",
    " ",
    "\0\x1b[2J\u202e",
    "\ud800",
    "x" * 100_000,
    [],
    {},
    ["a"],
    [["a"]],
    {"role": "user", "content": "a"},
    [{"role": "user"}],
    [{"role": "system", "content": None}, {"role": "tool", "content": [{"text": 1}]}],
)
_COLUMNS = ("instruction", "input", "output", "system", "history", "", "messages", "\ud800")


def mutated_rows(rows: Sequence[Mapping[str, Any]], seed: int) -> list[Any]:
    """Rows after one to three changes of values, names or whole rows."""
    dice = random.Random(seed)
    changed: list[Any] = [dict(row) for row in rows]
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(changed))
        match dice.randrange(5):
            case 0:
                changed[at] = dice.choice(_ROW_VALUES)
            case 1 if isinstance(changed[at], dict):
                changed[at].pop(dice.choice(_COLUMNS), None)
            case _ if isinstance(changed[at], dict):
                changed[at][dice.choice(_COLUMNS)] = dice.choice(_ROW_VALUES)
            case _:
                changed.append(changed[at])
    return changed


_SNIPPETS = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"[" * 500,
    b"\n\n",
    b"\r",
    b"\\u0000",
    b"NaN",
    b"1e999",
)


def _value(text: str, dice: random.Random) -> str:
    lines = text.splitlines()
    at = dice.randrange(len(lines)) if lines else 0
    if lines and ":" in lines[at]:
        lines[at] = f"{lines[at].partition(':')[0]}: {dice.choice(HOSTILE)}"
    return "\n".join(lines) + "\n"


def _inner_value(text: str, dice: random.Random) -> str:
    words = [
        part
        for part in ("alpaca", "float32", "64", "[2, 4]", "adamw", "true", "1e-4", "linear")
        if part in text
    ]
    return text.replace(dice.choice(words), dice.choice(HOSTILE), 1) if words else text


def _lines(text: str, dice: random.Random) -> str:
    lines = text.splitlines()
    if not lines:
        return text
    at, other = dice.randrange(len(lines)), dice.randrange(len(lines))
    match dice.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[other])
        case 2:
            lines[at], lines[other] = lines[other], lines[at]
        case 3:
            lines[at] = " " * dice.randint(1, 9) + lines[at]
        case _:
            lines[at] = lines[at].lstrip()
    return "\n".join(lines) + "\n"


def _character(text: str, dice: random.Random) -> str:
    at = dice.randrange(len(text) + 1)
    return (
        text[:at]
        + dice.choice("\t\"'{}[]:,#&*!|>%@`-?\n\r\x07\u2028é\U0001f600")
        + text[at + dice.randrange(2) :]
    )


def _nested(text: str, dice: random.Random) -> str:
    depth = dice.choice((20, 100, 400))
    return text + "".join(f"{' ' * level}k{level}:\n" for level in range(depth))


def _bombed(text: str, dice: random.Random) -> str:
    return bomb(dice.choice((1, 3, 6, 9))) + text


def _keys(text: str, dice: random.Random) -> str:
    return text + dice.choice(
        (
            "? [a]\n: b\n",
            "[a]: b\n",
            "{a: b}: c\n",
            "1: 2\n",
            "null: 3\n",
            "true: 4\n",
            "&k a: *k\n",
            "<<: {a: b}\n",
        )
    )


def _long(text: str, dice: random.Random) -> str:
    return text + "x: [" + "1, " * dice.choice((10_000, 100_000)) + "1]\n"


_ROUND_CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    _value,
    _value,
    _value,
    _inner_value,
    _lines,
    _lines,
    _character,
    _character,
    _nested,
    _bombed,
    _keys,
    _long,
)
