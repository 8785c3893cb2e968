"""Facts in SQL, beside Optuna's own tables in one database; they are the truth about its studies."""

from tuner.store.database import exists, normal_url
from tuner.store.lock import hold_study, is_held
from tuner.store.memory import CachedStore, MemoryStore, Store
from tuner.store.recording import kept
from tuner.store.sql import Revision, SqlStore, open_store, revision

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
    "revision",
]
