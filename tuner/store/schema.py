"""The tables of the facts, and column types that keep every digit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

from tuner.records.state import storable_text
from tuner.records.trials import Packed

VERSION_TABLE = "tuner_alembic_version"
"""Where Alembic keeps our revision; `alembic_version` in the same database is Optuna's."""


class ExactFloat(TypeDecorator[float]):
    """A float of which NaN and infinity come back too: SQLite turns a bound NaN into NULL.

    Of -0.0 SQLite keeps 0.0.
    """

    impl = Double
    cache_ok = True

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Replace the processor of Double, which would turn the text back into a float."""
        return _nan_as_text if dialect.name == "sqlite" else super().bind_processor(dialect)

    def process_result_value(self, value: Any, dialect: Dialect) -> float | None:
        """Return a float, from a float or from the text `nan`."""
        return None if value is None else float(value)


def _nan_as_text(value: float | None) -> float | str | None:
    return "nan" if value is not None and math.isnan(value) else value


class Numbers(TypeDecorator[tuple[Any, ...]]):
    """A tuple of numbers as little-endian bytes: `d` float64, `i` int32 (the codes of `struct`)."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code

    def process_bind_param(self, value: tuple[Any, ...] | Packed | None, dialect: Dialect) -> bytes | None:
        """Return the numbers as bytes."""
        if isinstance(value, Packed):
            return value.content
        return None if value is None else struct.pack(f"<{len(value)}{self.code}", *value)

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> tuple[Any, ...] | None:
        """Return the numbers."""
        return None if value is None else numbers(value, self.code)


def numbers(content: bytes, code: str) -> tuple[Any, ...]:
    """Return the numbers of a column of type `Numbers`."""
    return struct.unpack(f"<{len(content) // struct.calcsize('<' + code)}{code}", content)


class JsonText(TypeDecorator[Any]):
    """JSON in a text column: the JSON types of databases refuse NaN or reorder keys."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """Return compact JSON, in ASCII."""
        return json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return the document."""
        return json.loads(value)


class OptionalJson(JsonText):
    """JSON, or NULL for what is empty."""

    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """As of `JsonText`; what is empty is not written."""
        return super().process_bind_param(value, dialect) if value else None  # type: ignore[return-value]

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Return the document."""
        return None if value is None else super().process_result_value(value, dialect)


class FreeText(TypeDecorator[str]):
    """Text from outside, such as the end of a log."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text without what a database refuses."""
        return None if value is None else storable_text(value)


METADATA = MetaData()


def _of_a_trial() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["study", "round", "trial"], ["tuner_trials.study", "tuner_trials.round", "tuner_trials.number"]
    )


WRITERS = Table(
    "tuner_writers",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("writer", Text, nullable=False),
    # Counted, so that an older copy of the database is not taken for this one.
    Column("records", BigInteger, nullable=False),
)

ROUNDS = Table(
    "tuner_rounds",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("max_train_steps", Integer, nullable=False),
    Column("spec", JsonText, nullable=False),
    Column("begun_at", ExactFloat, nullable=False),
    Column("train_rows", Integer, nullable=False),
    Column("eval_rows", Integer, nullable=False),
    Column("workload", Text, nullable=False),
    Column("evaluation_share", ExactFloat, nullable=False),
    Column("kind", Text, nullable=False, server_default="search"),
)

TRIALS = Table(
    "tuner_trials",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("hyperparameters", JsonText, nullable=False),
    Column("continues", Text),
    Column("optuna_trial", Integer),
    # NULL until the end: waiting and running follow from the attempts.
    Column("state", Text),
    Column("reason", FreeText),
    Column("note", FreeText),
    Column("ended_at", ExactFloat),
    ForeignKeyConstraint(["study", "round"], ["tuner_rounds.study", "tuner_rounds.name"]),
)

ATTEMPTS = Table(
    "tuner_attempts",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("from_step", Integer, nullable=False),
    Column("to_step", Integer, nullable=False),
    Column("started_at", ExactFloat, nullable=False),
    Column("ended_at", ExactFloat),
    Column("outcome", Text),
    Column("message", FreeText),
    Column("environment", JsonText, nullable=False, server_default="{}"),
    _of_a_trial(),
)

EVALUATIONS = Table(
    "tuner_evaluations",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("eval_loss", ExactFloat, nullable=False),
    Column("train_loss", ExactFloat),
    Column("learning_rate", ExactFloat),
    Column("clipped_updates", Integer, nullable=False),
    Column("example_nll", Numbers("d"), nullable=False),
    Column("example_tokens", Numbers("i"), nullable=False),
    Column("correct_tokens", BigInteger),
    Column("metrics", OptionalJson),
    Column("objective", OptionalJson),
    _of_a_trial(),
)

CHECKPOINTS = Table(
    "tuner_checkpoints",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("kind", Text, primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    # A removed checkpoint keeps its row, so that saying it was saved again does not revive it.
    Column("removed", Boolean, nullable=False),
    ForeignKeyConstraint(
        ["study", "round", "trial", "attempt"],
        ["tuner_attempts.study", "tuner_attempts.round", "tuner_attempts.trial", "tuner_attempts.number"],
    ),
)

BRANCHES = Table(
    "tuner_branches",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("max_train_steps", Integer, primary_key=True, autoincrement=False),
    Column("from_step", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", FreeText),
    # Documents: nothing but the branch itself is asked of them.
    Column("attempts", JsonText, nullable=False),
    Column("checkpoint", JsonText, nullable=False),
    Column("evaluation", JsonText, nullable=False),
    _of_a_trial(),
)

FINAL_SCORES = Table(
    "tuner_final_scores",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),
    Column("loss", ExactFloat, nullable=False),
    Column("standard_error", ExactFloat),
    Column("num_examples", Integer, nullable=False),
    Column("num_tokens", BigInteger, nullable=False),
    Column("rows", Text, nullable=False),
    Column("scored_at", ExactFloat, nullable=False),
    _of_a_trial(),
)

ANSWER_SCORES = Table(
    "tuner_answer_scores",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("trial", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, nullable=False),
    Column("metric", Text, nullable=False),
    Column("mean", ExactFloat, nullable=False),
    Column("standard_error", ExactFloat),
    Column("num_examples", Integer, nullable=False),
    Column("is_objective", Boolean, nullable=False),
    _of_a_trial(),
)

THROUGHPUTS = Table(
    "tuner_throughput",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("session", Text, primary_key=True),
    Column("training_seconds", ExactFloat, nullable=False),
    Column("evaluating_seconds", ExactFloat, nullable=False),
    Column("saving_seconds", ExactFloat, nullable=False),
    Column("passes", BigInteger, nullable=False),
    Column("micro_steps", BigInteger, nullable=False),
    Column("trial_steps", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("padded_tokens", BigInteger, nullable=False),
    Column("peak_memory_bytes", BigInteger, nullable=False),
    ForeignKeyConstraint(["study", "round"], ["tuner_rounds.study", "tuner_rounds.name"]),
)

NODE_CHANGES = Table(
    "tuner_node_changes",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("round", Text, primary_key=True),
    Column("at", ExactFloat, primary_key=True),
    Column("node", Text, primary_key=True),
    Column("change", Text, primary_key=True),
    Column("gpus", Integer, nullable=False),
    Column("reason", FreeText),
    ForeignKeyConstraint(["study", "round"], ["tuner_rounds.study", "tuner_rounds.name"]),
)

PROMOTIONS = Table(
    "tuner_promotions",
    METADATA,
    Column("study", Text, primary_key=True),
    Column("to_round", Text, primary_key=True),
    Column("from_round", Text, nullable=False),
    Column("plan", JsonText, nullable=False),
    Column("file_text", FreeText, nullable=False),
    Column("planned_at", ExactFloat, nullable=False),
    ForeignKeyConstraint(["study", "from_round"], ["tuner_rounds.study", "tuner_rounds.name"]),
)
