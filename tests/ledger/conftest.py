"""Ledgers in SQLite and in a real PostgreSQL server."""

import pytest

from benchmarks.postgres import Postgres, programs
from dpft.ledger import Ledger


@pytest.fixture(scope="session")
def postgres():
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with Postgres() as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keys and the default ledger go to a folder of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DPFT_LEDGER", raising=False)
    monkeypatch.delenv("DPFT_LEDGER_KEY", raising=False)
    return tmp_path / "home" / "dpft"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return str(tmp_path / "ledger.db") if request.param == "sqlite" else request.getfixturevalue("postgres").database()


@pytest.fixture
def ledger(url):
    opened = Ledger(url)
    yield opened
    opened.close()


@pytest.fixture
def rows():
    return [{"text": f"note {i}", "patient": f"p{i % 40}"} for i in range(200)]
