"""Facts in SQL, next to Optuna's tables in one database. The facts are authoritative."""

from tuner.store.database import exists, explained_at, normal_url, optuna_arguments
from tuner.store.lock import Hold, hold_study, is_held
from tuner.store.memory import CachedStore, MemoryStore, Store
from tuner.store.recording import kept
from tuner.store.sql import (
    Revision,
    SqlStore,
    making_tables,
    open_store,
    open_to_read,
    refuse_damaged,
    revision,
)

__all__ = [
    "CachedStore",
    "Hold",
    "MemoryStore",
    "Revision",
    "SqlStore",
    "Store",
    "exists",
    "explained_at",
    "hold_study",
    "is_held",
    "kept",
    "making_tables",
    "normal_url",
    "open_store",
    "open_to_read",
    "optuna_arguments",
    "refuse_damaged",
    "revision",
]
