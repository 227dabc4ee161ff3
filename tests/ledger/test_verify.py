"""Whatever is changed outside of dpft shows."""

import sqlite3
from contextlib import closing

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from benchmarks.postgres import Postgres
from dpft.cli import main
from dpft.errors import LedgerError
from dpft.ledger import Ledger, database
from dpft.ledger.chain import Key, canonical
from dpft.ledger.database import Store
from dpft.ledger.verify import export, read_export, restore, verify
from dpft.privacy.composition import Event


@pytest.fixture
def written(ledger):
    notes = ledger.create("notes", epsilon=5.0, delta=1e-5)
    for noise in (1.0, 1.5, 2.0):
        notes.spend([Event(10, noise, 0.01)], purpose=f"noise {noise}")
    return ledger


def change(url, statement):
    """What a person with the database's password can do."""
    engine = sa.create_engine(Store(url).url)
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(sa.text("DROP TRIGGER IF EXISTS no_update"))
            connection.execute(sa.text("DROP TRIGGER IF EXISTS no_delete"))
        else:
            connection.execute(sa.text("ALTER TABLE entries DISABLE TRIGGER USER"))
        for part in statement.split(";"):
            connection.exec_driver_sql(part)
    engine.dispose()


def test_an_untouched_ledger_verifies_and_every_figure_is_composed_again(written):
    found = verify(*written.store.after(0), public_key=written.public_key)
    assert found.verified and found.figures == 3 and found.entries == written.refresh().seq == 11


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = replace(body, '\"count\":10', '\"count\":1') WHERE seq = 4",
        "UPDATE entries SET dataset = 'nodes' WHERE seq = 5",
        "UPDATE entries SET kind = 'note' WHERE seq = 4",
        "DELETE FROM entries WHERE seq = 5",
        "DELETE FROM entries WHERE seq = 11",
        "DELETE FROM entries WHERE seq = 11; UPDATE head SET seq = 10, hash = (SELECT hash FROM entries WHERE seq = "
        "10)",
        "DELETE FROM entries",
        "UPDATE entries SET seq = 100 WHERE seq = 4; UPDATE entries SET seq = 4 WHERE seq = 7; UPDATE entries SET seq "
        "= 7 WHERE seq = 100",
        "INSERT INTO entries SELECT 12, dataset, kind, body, hash, hash, signature FROM entries WHERE seq = 11",
        "UPDATE entries SET signature = (SELECT e.signature FROM entries e WHERE e.seq = 3) WHERE seq = 4",
        "UPDATE entries SET signature = signature || ' ' WHERE seq = 4",
        "UPDATE entries SET signature = upper(signature) WHERE seq = 4",
        "UPDATE head SET signature = (SELECT signature FROM entries WHERE seq = 11)",
        "DELETE FROM head",
    ],
)
def test_a_tampered_ledger_is_found_and_not_used(written, url, statement):
    change(url, statement)
    assert not verify(*Store(url).after(0), public_key=written.public_key, figures=False).verified
    if "entries SET signature" not in statement:  # single signatures are verify's, the chain everyone's
        with pytest.raises(LedgerError):
            Ledger(url).dataset("notes").spend([Event(1, 9.0, 0.01)], purpose="more")


def test_a_false_figure_is_found_by_the_other_accountant(written, url):
    """Someone with the key, or a wrong accountant: the chain holds, ε does not."""
    rows, _ = written.store.after(0)
    key, previous, forged = written.key, "0" * 64, []
    for row in rows:
        facts = {**row.facts, "epsilon": 0.1} if row.kind == "settle" and row.seq == 8 else row.facts
        forged.append(key.entry(row.seq, row.dataset, row.kind, facts, previous))
        previous = forged[-1].hash
    end = (len(forged), previous, key.sign(f"head {len(forged)} {previous}"))
    found = verify(forged, end)
    assert len(found.problems) == 1 and "says that 'notes' had spent ε = 0.1" in found.problems[0]


def test_an_overspent_account_is_found(written):
    changes = {"policy": {"epsilon": 0.01}}
    written._append("notes", "amend", lambda book: changes)
    assert "has spent" in verify(*written.store.after(0)).problems[0]


def test_another_key_is_found(written):
    found = verify(*written.store.after(0), public_key=Key.new().public, figures=False)
    assert "was expected" in found.problems[0]


def test_the_database_itself_refuses_changes(written, url):
    engine = sa.create_engine(Store(url).url)
    for statement in ("UPDATE entries SET kind = 'x'", "DELETE FROM entries"):
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(sa.text(statement))
    engine.dispose()


def test_an_older_copy_put_in_its_place_is_found(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(str(path))
    notes = ledger.create("notes", epsilon=5.0, delta=1e-5)
    ledger.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", (str(tmp_path / "copy.db"),))
    notes.spend([Event(10, 1.0, 0.01)], purpose="to be forgotten")
    ledger.close()
    for left in tmp_path.glob("ledger.db*"):
        left.unlink()
    (tmp_path / "copy.db").rename(path)
    with pytest.raises(LedgerError, match="an older copy was put in its place"):
        Ledger(str(path))
    found = CliRunner().invoke(main, ["ledger", "verify", "--ledger", str(path)])
    assert found.exit_code == 1 and "an older copy was put in its place" in found.output


def test_an_export_verifies_offline_and_fills_a_new_ledger(written, tmp_path, home):
    path = tmp_path / "ledger.jsonl"
    assert export(written.store, path) == 11
    assert verify(*read_export(path), public_key=written.public_key).verified
    assert restore(path, Store(str(tmp_path / "new.db")), public_key=written.public_key).verified
    assert Ledger(str(tmp_path / "new.db")).dataset("notes").spent() == written.dataset("notes").spent()
    with pytest.raises(LedgerError, match="holds a ledger already"):
        restore(path, Store(str(tmp_path / "new.db")))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\r", "\x1c"])
def test_an_export_holds_whatever_a_purpose_says(ledger, tmp_path, separator):
    ledger.create("notes", epsilon=5.0, delta=1e-5).spend([Event(1, 1.0, 0.01)], purpose=f"one{separator}two")
    export(ledger.store, tmp_path / "ledger.jsonl")
    assert verify(*read_export(tmp_path / "ledger.jsonl")).verified


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cr3t@127.0.0.1:1/none",
        "postgresql://127.0.0.1:1/none?user=me&password=s3cr3t",
        "oracle9://me:s3cr3t@somewhere",
        "postgresql://me:s3cr3t@127.0.0.1:port/none",
    ],
)
def test_no_password_is_repeated(url):
    with pytest.raises(LedgerError) as refused:
        Ledger(url)
    assert "s3cr3t" not in str(refused.value)


def test_every_byte_of_an_export_matters(written, tmp_path):
    path, changed = tmp_path / "ledger.jsonl", tmp_path / "changed.jsonl"
    export(written.store, path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert not verify(*read_export(changed), public_key=written.public_key, figures=False).verified, place
        except LedgerError:
            pass


def test_facts_are_written_in_one_way():
    assert canonical({"b": 1.5, "a": "é"}) == '{"a":"é","b":1.5}'
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


# -- when the store fails ---------------------------------------------------------------------------------------------


@pytest.fixture
def own_postgres(postgres):
    """A server with nothing else in it: after a crash it flushes every database that it has."""
    with Postgres() as server:
        yield server


def test_a_server_that_is_gone_stops_charges_and_back_again_goes_on(own_postgres):
    ledger = Ledger(own_postgres.database())
    run = ledger.create("notes", epsilon=5.0, delta=1e-5).open(plan())
    run.charge(1)
    own_postgres.stop("immediate")
    try:
        with pytest.raises(LedgerError, match="nothing may be released"):
            run.charge(1)
    finally:
        own_postgres.start()
    run.charge(1)
    assert ledger.dataset("notes").record.runs[run.id].steps == 2
    ledger.close()


def test_a_read_only_file_and_a_full_disk_stop_charges(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.db"))
    run = ledger.create("notes", epsilon=5.0, delta=1e-5).open(plan())
    ledger.close()
    with ledger.store._engine.connect() as connection:
        connection.execute(sa.text("PRAGMA query_only = 1"))
    with pytest.raises(LedgerError, match="readonly"):
        run.charge(1)
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
    sa.event.listen(
        ledger.store._engine, "connect", lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}")
    )
    with pytest.raises(LedgerError, match="full"):
        for _ in range(1000):
            run.charge(1)
    ledger.close()
    again = Ledger(str(tmp_path / "ledger.db"))
    assert verify(*again.store.after(0), figures=False).verified


def test_a_place_that_is_no_ledger_is_named(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be mistaken for one" * 50)
    for url, said in [
        (str(tmp_path / "text.db"), "not a database"),
        ("postgresql://nobody@127.0.0.1:1/none", "cannot be used"),
        ("oracle9://somewhere", "names no database"),
    ]:
        with pytest.raises(LedgerError, match=said):
            Ledger(url)
    with pytest.raises(LedgerError, match="There is no ledger at"):
        Ledger(str(tmp_path / "nowhere.db"), create=False)


def test_the_migrations_make_the_tables_that_the_store_reads(url):
    made = Store(url)
    with made._engine.connect() as connection:
        inspector = sa.inspect(connection)
        for table in (database.entries, database.head):
            assert {c["name"] for c in inspector.get_columns(table.name)} == {c.name for c in table.columns}
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == database.REVISION
    made.close()


def plan():
    from dpft.privacy.plan import Plan

    return Plan(noise_multiplier=5.0, sample_rate=0.001, steps=2000, delta=1e-5)
