"""Every hyperparameter a round file may name: its default, what it may be, what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tuner.config.kinds import ALL_LINEAR, Flag, Integer, Kind, Modules, Number, OneOf
from tuner.records import Value


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """One row of the table in docs/reference/hyperparameters.md."""

    name: str
    default: Value | None
    """None where the default depends on the horizon; see `default_note`."""
    kind: Kind
    meaning: str
    default_note: str = ""
    """What the default depends on, in words."""
    may_follow_rank: bool = False
    """Whether `{times_sqrt_r: FACTOR}` is allowed."""

    @property
    def allowed(self) -> str:
        """The values it accepts, in words."""
        return self.kind.allowed + (" or {times_sqrt_r: FACTOR}" if self.may_follow_rank else "")


_ROWS = (
    Hyperparameter(
        "learning_rate",
        3e-4,
        Number(above=0),
        "Peak learning rate: what the schedule multiplies.",
    ),
    Hyperparameter("lora_r", 16, Integer(at_least=1), "Rank of the adapter's matrices."),
    Hyperparameter(
        "lora_alpha",
        16.0,
        Number(above=0),
        "The adapter's output is scaled by lora_alpha / lora_r, or / sqrt(lora_r) with use_rslora. "
        "{times_sqrt_r: 4} makes it 4 sqrt(lora_r) in each trial.",
        may_follow_rank=True,
    ),
    Hyperparameter(
        "target_modules",
        ALL_LINEAR,
        Modules(),
        "Linear layers that get an adapter: all of them but the output head, or those whose name ends so. "
        "Searched by a list of such values: [all-linear, [q_proj, v_proj]].",
    ),
    Hyperparameter(
        "batch_size",
        8,
        Integer(at_least=1),
        "Sequences per optimizer step. How it is cut into micro-batches is the machine's business and "
        "changes no result.",
    ),
    Hyperparameter(
        "optimizer",
        "adamw_8bit",
        OneOf(("adamw", "adamw_8bit")),
        "AdamW with 32-bit moments, or with bitsandbytes' 8-bit moments.",
    ),
    Hyperparameter(
        "warmup_steps",
        5,
        Integer(at_least=0),
        "Steps over which the rate rises linearly from 0.",
        default_note="less where a short round leaves no room for it",
    ),
    Hyperparameter(
        "schedule",
        "linear",
        OneOf(("constant", "linear", "cosine")),
        "The rate after warmup: constant; constant and then linearly to 0 over the last decay_steps; "
        "or half a cosine to 0.",
    ),
    Hyperparameter(
        "decay_steps",
        None,
        Integer(at_least=0),
        "Steps of the linear decay at the end; only the schedule linear has it.",
        default_note="40% of max_train_steps, less where warmup leaves no room for it",
    ),
    Hyperparameter(
        "lora_dropout",
        0.0,
        Number(at_least=0, below=1),
        "Probability of dropping an input of the adapter while training.",
    ),
    Hyperparameter(
        "use_rslora",
        False,
        Flag(),
        "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA, arXiv:2312.03732).",
    ),
    Hyperparameter(
        "use_dora",
        False,
        Flag(),
        "Learn magnitude and direction of the weights apart (DoRA, arXiv:2402.09353). "
        "Where a trial may, all of the round train one at a time.",
    ),
    Hyperparameter(
        "loraplus_ratio",
        1.0,
        Number(above=0),
        "Learning rate of the B matrices over that of the A matrices (LoRA+, arXiv:2402.12354).",
    ),
    Hyperparameter(
        "lora_init",
        "default",
        OneOf(("default", "gaussian")),
        "How the A matrices start: PEFT's default (Kaiming uniform), or normally distributed. B starts at 0.",
    ),
    Hyperparameter(
        "weight_decay",
        0.0,
        Number(at_least=0),
        "AdamW's decoupled weight decay of the adapter.",
    ),
    Hyperparameter("adam_beta1", 0.9, Number(at_least=0, below=1), "Decay of the first moment's average."),
    Hyperparameter("adam_beta2", 0.999, Number(at_least=0, below=1), "Decay of the second moment's average."),
    Hyperparameter("adam_epsilon", 1e-8, Number(above=0), "Added to the root of the second moment."),
    Hyperparameter(
        "max_grad_norm",
        1.0,
        Number(above=0),
        "The gradient of a step is scaled down to this norm when it is longer.",
    ),
    Hyperparameter(
        "training_seed",
        0,
        Integer(at_least=0),
        "Seed of the adapter's initialisation, the order of the data and dropout.",
    ),
)


def limits() -> dict[str, tuple[float | None, float | None]]:
    """Return the lowest and the highest value that each number may have by name, None where there is none."""
    return {row.name: row.kind.limits for row in _ROWS if isinstance(row.kind, (Integer, Number))}


HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType({row.name: row for row in _ROWS})
"""The table by name, in the order of the reference page."""
