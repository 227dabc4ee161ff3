"""A PostgreSQL server of its own, on loopback, for as long as a test or a benchmark runs."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def programs() -> Path | None:
    """The folder with ``initdb`` and ``pg_ctl``; None if PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    known = shutil.which("initdb")
    return Path(known).resolve().parent if known else None


class Postgres:
    """``with Postgres() as server: server.database()`` gives the URL of a new, empty database."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="dpft-postgres-"))
        self._bin = programs()
        # The server refuses to run as root; Debian's package brings a user for it.
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self._user = "postgres" if self._as else getpass.getuser()
        self._databases = 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> "Postgres":
        if self._as:
            shutil.chown(self._folder, "postgres")
        self._run("initdb", "-D", self._data, "-A", "trust", "-U", self._user, "--no-sync", "-E", "UTF8")
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop("immediate")  # nothing of it is kept
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self._folder}"
        # After a crash it first flushes every database that was ever made here: minutes on a busy machine.
        self._run("pg_ctl", "-D", self._data, "-w", "-t", "300", "-l", f"{self._folder}/log", "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """``mode`` is pg_ctl's: ``immediate`` is a crash."""
        self._run("pg_ctl", "-D", self._data, "-w", "-m", mode, "stop", check=False)

    def database(self) -> str:
        self._databases += 1
        name = f"ledger{self._databases}_{int(time.time())}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", self._user, name)
        return f"postgresql://{self._user}@127.0.0.1:{self.port}/{name}"

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        path = self._bin / program
        command = [*self._as, str(path if path.exists() else shutil.which(program)), *arguments]
        # The server inherits these: a pipe would keep its reader waiting for as long as the server lives.
        subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
