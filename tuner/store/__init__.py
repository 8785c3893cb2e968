"""Facts in SQL, next to Optuna's tables in one database. The facts are authoritative."""

from tuner.store.database import exists, normal_url
from tuner.store.lock import hold_study, is_held
from tuner.store.memory import CachedStore, MemoryStore, Store
from tuner.store.recording import kept
from tuner.store.sql import Revision, SqlStore, open_store, refuse_damaged, revision

__all__ = [
    "CachedStore",
    "MemoryStore",
    "Revision",
    "SqlStore",
    "Store",
    "exists",
    "hold_study",
    "is_held",
    "kept",
    "normal_url",
    "open_store",
    "refuse_damaged",
    "revision",
]
