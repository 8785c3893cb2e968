"""A small file system, for tests of a full disk."""

from tests.cli.conftest import small_disk

__all__ = ["small_disk"]
