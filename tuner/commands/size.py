"""How large a checkpoint of a command will be, from its configuration and the files of its base model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.commands.launch import read_config
from tuner.config import RoundSpec
from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.tools import options_of
from tuner.records import Choices, Dimension, Fixed, Range

_MODEL = ("model_name_or_path", "base_model")
_RANK = ("lora_r", "lora_rank")
_TARGETS = ("target_modules", "lora_target_modules", "lora_target")
_DEFAULT_RANK = 16
"""The largest of the tools' own."""
_BYTES_PER_WEIGHT = 12
"""Of a trained weight in float32, with the two moments of AdamW."""
_NOT_ADAPTED = ("embed", "lm_head", "wte", "wpe")


def estimated_bytes(spec: RoundSpec, directory: Path) -> int | None:
    """Return the most bytes of one checkpoint; None where the base model is not in a folder of this machine.

    Weights and the moments of AdamW in float32, as Trainers save them, and the tokenizer's files.
    """
    assert spec.command is not None
    said = {**read_config(spec.command), **options_of(spec.command.run)}
    name = next((said[key] for key in _MODEL if said.get(key)), None)
    folder = directory / str(name)
    if name is None or not folder.is_dir():
        return None
    try:
        sizes = dict(shapes(folder))
    except (OSError, ValueError):  # such as a pointer of Git LFS in place of the weights
        return None
    if not sizes:
        return None
    whole = sum(math.prod(shape) for shape in sizes.values())
    weights = _adapter(spec, said, sizes) if _has_adapter(said) else whole
    beside = sum(path.stat().st_size for path in folder.glob("*token*") if path.is_file())
    return _BYTES_PER_WEIGHT * weights + beside


def _has_adapter(said: Mapping[str, Any]) -> bool:
    uses_peft = str(said.get("use_peft")).lower() == "true"
    return uses_peft or said.get("adapter") in ("lora", "qlora") or said.get("finetuning_type") == "lora"


def _adapter(spec: RoundSpec, said: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> int:
    """Return the weights of the largest adapter; of all linear layers where the targets are not listed."""
    space = spec.space()
    written = next((str(said[key]) for key in _RANK if said.get(key)), "")
    given = int(written) if written.isdecimal() else _DEFAULT_RANK  # the tool refuses another
    rank = _largest(space["lora_r"]) if "lora_r" in space else given
    fixed = space.get("target_modules")
    listed = fixed.value if isinstance(fixed, Fixed) else None if fixed else _targets(said)
    names = tuple(str(each) for each in listed) if isinstance(listed, (list, tuple)) else None
    return sum(
        rank * (shape[0] + shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and _is_adapted(name.removesuffix(".weight"), names)
    )


def _targets(said: Mapping[str, Any]) -> Any:
    found = next((said[key] for key in _TARGETS if said.get(key)), None)
    if isinstance(found, str):
        return None if found in ("all", ALL_LINEAR) else found.split(",")
    return None if found == [ALL_LINEAR] else found


def _is_adapted(name: str, targets: tuple[str, ...] | None) -> bool:
    if targets is not None:
        return any(name == target or name.endswith(f".{target}") for target in targets)
    return not any(part in name for part in _NOT_ADAPTED)


def _largest(dimension: Dimension) -> int:
    match dimension:
        case Fixed(value=value):
            return int(str(value))
        case Choices(values=values):
            return max(int(str(value)) for value in values)
        case Range(high=high):
            return int(high)
    return _DEFAULT_RANK


def shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Yield names and shapes of a model's weights from the heads of its safetensors files.

    Raises OSError and ValueError for a file that is not one.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"{path}: is not a safetensors file")
            head = json.loads(file.read(length))
        weights = head if isinstance(head, dict) else {"": None}
        yield from ((name, _shape(about, path)) for name, about in weights.items() if name != "__metadata__")


def _shape(about: Any, path: Path) -> list[int]:
    shape = about.get("shape") if isinstance(about, dict) else None
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise ValueError(f"{path}: is not a safetensors file")
    return shape
