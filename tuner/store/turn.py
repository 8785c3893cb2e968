"""Whose turn it is to write a study: two processes that both believe to hold its lock never mix their facts.

A lock is lost without a word when its connection drops. So each transaction names its writer in the study's
row of `tuner_writers`, which it holds until it ends, and goes on only where the last one was its own.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass, field

from sqlalchemy import Connection, insert, select, update
from sqlalchemy.exc import IntegrityError

from tuner.errors import StudyTaken
from tuner.store.schema import WRITERS


def _new_writer() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} {secrets.token_hex(8)}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What an open store knows of the transactions that wrote to its study."""

    study: str
    last: tuple[str, int] | None
    """The last writer, and the number of its transactions; None if nobody has written yet."""
    me: str = field(default_factory=_new_writer)

    @classmethod
    def found(cls, connection: Connection, study: str) -> Turn:
        """Return the turn of a store that is opened now."""
        return cls(study, _last(connection, study))

    def taken(self, connection: Connection) -> Turn:
        """Write this store's name within a transaction; return what is known once it is committed.

        Raises StudyTaken where somebody else has written since. Transactions of this store may be there
        although their commits seemed to fail.
        """
        found = _last(connection, self.study, for_update=True)
        mine = self.last[1] if self.last is not None and self.last[0] == self.me else 0
        is_mine = found is not None and found[0] == self.me and found[1] > mine
        if found != self.last and not is_mine:
            raise StudyTaken(_taken_by(self.study, found))
        records = found[1] + 1 if found is not None and found[0] == self.me else 1
        values = {"writer": self.me, "records": records}
        if found is None:
            try:
                connection.execute(insert(WRITERS).values(study=self.study, **values))
            except IntegrityError as error:  # at the same moment
                raise StudyTaken(_taken_by(self.study, ("another process ", 1))) from error
        else:
            connection.execute(update(WRITERS).where(WRITERS.c.study == self.study).values(**values))
        return Turn(self.study, (self.me, records), self.me)


def _last(connection: Connection, study: str, *, for_update: bool = False) -> tuple[str, int] | None:
    statement = select(WRITERS.c.writer, WRITERS.c.records).where(WRITERS.c.study == study)
    row = connection.execute(statement.with_for_update() if for_update else statement).first()
    return None if row is None else (row.writer, row.records)


def _taken_by(study: str, found: tuple[str, int] | None) -> str:
    if found is None:
        return f"the database does not know the study {study} any more: it was replaced while it was in use"
    writer = found[0].rpartition(" ")[0]
    return (
        f"{writer} has written to the study {study} meanwhile, or the database was replaced by an older "
        "copy: this process records nothing more"
    )
