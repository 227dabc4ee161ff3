"""Where entries lie: SQLite by default, PostgreSQL for teams; one append-only table and a signed end, through
SQLAlchemy.

An append is one transaction that first takes the lock on the end: writers queue, and none sees half of another's entry.
SQLite runs with a write-ahead log that is flushed at every commit.
"""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from dpft.errors import LedgerError, first_line
from dpft.ledger.chain import End, Entry

if TYPE_CHECKING:
    from sqlite3 import Connection as SQLite

REVISION = "0001"
WAIT_SECONDS = 60

metadata = sa.MetaData()
entries = sa.Table(
    "entries",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("signature", sa.Text, nullable=False),
)
head = sa.Table(
    "head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("signature", sa.Text, nullable=False),
)


# Built once: building them took half of a charge's time.
AFTER = sa.select(entries).where(entries.c.seq > sa.bindparam("after")).order_by(entries.c.seq)
END = sa.select(head.c.seq, head.c.hash, head.c.signature)
ADD, BEGIN_HEAD, MOVE_HEAD = entries.insert(), head.insert(), head.update().where(head.c.id == sa.bindparam("which"))


SECRETS = ("password", "sslpassword", "passfile")  # keys of a URL's query that libpq takes


def default_url() -> str:
    """``DPFT_LEDGER``, or a SQLite file in the user's data folder."""
    return os.environ.get("DPFT_LEDGER") or str(data_folder() / "ledger.db")


def data_folder() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dpft"


class Store:
    """The entries at ``url``: a SQLAlchemy URL, or the path of a SQLite file.

    Raises:
        LedgerError: from every method, if the database cannot be reached, read or written.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        if "://" not in url:
            path = Path(url).expanduser()
            if not create and not path.exists():
                raise LedgerError(f"There is no ledger at {path}: create a data set in it, or name another --ledger.")
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            url = f"sqlite:///{path}"
        if url.startswith(("postgres://", "postgresql://")):
            url = "postgresql+psycopg://" + url.split("://", 1)[1]
        try:
            self.url = sa.make_url(url)
        except (sa.exc.ArgumentError, ValueError) as error:  # which may repeat the URL, and a password in it
            raise LedgerError("The ledger's URL cannot be read: write postgresql://USER@HOST:PORT/DATABASE.") from error
        with _spoken(str(self)):
            self._sqlite = self.url.get_backend_name() == "sqlite"
            options = {"timeout": WAIT_SECONDS} if self._sqlite else {"connect_timeout": 10}
            self._engine = sa.create_engine(self.url, connect_args=options, pool_pre_ping=not self._sqlite)
        weakref.finalize(self, self._engine.dispose)  # nobody need close a ledger: its connections go when it goes
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _flush_every_commit)
            sa.event.listen(self._engine, "begin", _lock_if_writing)
        self._migrate()

    def __str__(self) -> str:
        hidden = {key: "***" for key in self.url.query if key in SECRETS}
        return self.url.update_query_dict(hidden).render_as_string(hide_password=True)

    def close(self) -> None:
        self._engine.dispose()

    def after(self, seq: int) -> tuple[list[Entry], End | None]:
        """The entries after ``seq``, in order, and the signed end ``(seq, hash, signature)``."""
        with self._begin(writing=False) as connection:
            return _after(connection, seq)

    def append(
        self, make: Callable[[list[Entry], End | None], tuple[Entry, str] | None], seq: int
    ) -> tuple[Entry, str] | None:
        """Add one entry, in a transaction of its own.

        Args:
            make: is given the entries after ``seq`` and the end, under the lock; returns the entry and the signature of
                the new end, or None to add nothing.

        Returns:
            What ``make`` made, when it is on disk.
        """
        with self._begin(writing=True) as connection:
            if not self._sqlite:
                connection.execute(sa.text("LOCK TABLE head IN EXCLUSIVE MODE"))
            made = make(*_after(connection, seq))
            if made is None:
                return None
            entry, signature = made
            connection.execute(ADD, vars(entry))
            end = {"seq": entry.seq, "hash": entry.hash, "signature": signature}
            if entry.seq == 1:
                connection.execute(BEGIN_HEAD, {"id": 1, **end})
            else:
                connection.execute(MOVE_HEAD, {"which": 1, **end})
        return made

    def restore(self, rows: list[Entry], end: End) -> None:
        """Fill an empty store with verified entries."""
        with self._begin(writing=True) as connection:
            if connection.execute(sa.select(sa.func.count()).select_from(entries)).scalar():
                raise LedgerError(f"{self} holds a ledger already: import into a new one.")
            connection.execute(ADD, [vars(row) for row in rows])
            connection.execute(BEGIN_HEAD, {"id": 1, "seq": end[0], "hash": end[1], "signature": end[2]})

    @contextmanager
    def _begin(self, *, writing: bool) -> Iterator[sa.Connection]:
        options: dict[str, Any] = {"writing": writing}
        if not writing and not self._sqlite:  # entries and end are read by two statements, and must be of one moment
            options["isolation_level"] = "REPEATABLE READ"
        with _spoken(str(self)), self._engine.connect() as connection:
            with connection.execution_options(**options).begin():
                yield connection

    def _migrate(self) -> None:
        """Bring the tables to this version's form; every other start finds them so and only looks."""
        with _spoken(str(self)), self._engine.connect() as connection:
            connection = connection.execution_options(writing=False)
            known = sa.inspect(connection).has_table("alembic_version")
            revision = (
                connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() if known else None
            )
        if revision == REVISION:
            return
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with _spoken(str(self)), self._engine.connect() as connection:
            with connection.execution_options(writing=True).begin():
                if not self._sqlite:  # processes that start together: one migrates, the others find it done
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(4441)"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _after(connection: sa.Connection, seq: int) -> tuple[list[Entry], End | None]:
    found = [Entry(*row) for row in connection.execute(AFTER, {"after": seq})]
    end = connection.execute(END).first()
    return found, None if end is None else tuple(end)


def _flush_every_commit(connection: "SQLite", _: object) -> None:
    connection.isolation_level = None  # transactions begin where the engine says so
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={WAIT_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _lock_if_writing(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writing") else "BEGIN")


@contextmanager
def _spoken(where: str) -> Iterator[None]:
    """Databases' errors as one sentence."""
    try:
        yield
    except sa.exc.NoSuchModuleError as error:
        raise LedgerError(
            f"{where} names no database that is known here: use a file's path or postgresql://."
        ) from error
    except ModuleNotFoundError as error:
        raise LedgerError(f"The ledger {where} needs {error.name}: pip install dpft[postgres].") from error
    except sa.exc.SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        raise LedgerError(
            f"The ledger {where} cannot be used ({reason}), so nothing may be released on its account: fix that and "
            "try again."
        ) from error
