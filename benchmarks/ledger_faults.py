"""Kills, races, tampering and speed of the ledger: what happens when everything goes wrong.

    python benchmarks/ledger_faults.py --json [--kills 500] [--rounds 200] [--tamperings 1000] [--store sqlite]

kills        processes that charge and release are killed (SIGKILL) at random instants; what they released is kept in a
file that is
             flushed after every release. Every twentieth is a real training run. ``under_counted`` counts releases that
             were not charged.
races        16 processes ask for the last of a budget at the same instant; ``overspent`` counts rounds in which more
was granted.
tamperings   single bytes of an export and of a SQLite file, and whole rows, are changed; ``unnoticed`` counts changes
of what the
             ledger says that neither opening nor verifying finds. Bytes of a SQLite file that no row depends on are
             counted apart.
speed        the latency of a charge with 10,000 entries present, and the composition of 300 different events, from
nothing.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from output import circumstances, deliver, options

sys.path.insert(0, str(Path(__file__).parent.parent))

RACERS = 16
SPAWN = multiprocessing.get_context("spawn")


def plan(steps: int = 10_000):
    import dpft

    return dpft.Plan(noise_multiplier=20.0, sample_rate=0.001, steps=steps, delta=1e-6)


# -- kills -------------------------------------------------------------------------------------------------------------


def release_forever(url: str, journal: str) -> None:
    """Charge a block, release it one by one, and write down each release after it happened."""
    from dpft.ledger import About, Ledger

    run = Ledger(url).dataset("kills").open(plan(), About(purpose=journal))
    with open(journal, "a") as file:
        print(run.id, file=file, flush=True)
        for _ in range(1000):
            run.charge(3)
            for _ in range(3):
                print("released", file=file, flush=True)
                os.fsync(file.fileno())


def train_forever(url: str, journal: str) -> None:
    """A real training run: a small BERT of random weights, DPTrainer, one release a step."""
    import torch
    import transformers

    import dpft
    from dpft.ledger import Ledger
    from tests.support.zoo import Case

    torch.set_num_threads(1)
    made = Case("bert")
    model = dpft.Subset("head").apply(made.model)

    class Journal(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with open(journal, "a") as file:
                if state.global_step == 1:
                    print(trainer.session.account.run.id, file=file)
                print("released", file=file, flush=True)
                os.fsync(file.fileno())

    folder = journal + ".run"
    steps = dpft.Plan(noise_multiplier=20.0, sample_rate=0.05, steps=400, delta=1e-6, units=40)
    arguments = transformers.TrainingArguments(
        folder, report_to=[], disable_tqdm=True, save_strategy="no", logging_strategy="no"
    )
    trainer = dpft.DPTrainer(
        model=model,
        args=arguments,
        train_dataset=made.examples * 10,
        plan=steps,
        task=dpft.LabelledTask(made.batch),
        ledger=Ledger(url).dataset("kills"),
        callbacks=[Journal()],
    )
    trainer.train()


def kills(url: str, count: int, folder: Path) -> dict:
    from dpft.ledger import Ledger
    from dpft.ledger.verify import verify

    ledger = Ledger(url)
    ledger.create("kills", epsilon=1e3, delta=1e-6)
    random.seed(0)
    under, released, charged, never, bad = 0, 0, 0, 0, 0
    for i in range(count):
        journal = folder / f"{i}.txt"
        train = i % 20 == 19
        child = SPAWN.Process(target=train_forever if train else release_forever, args=(url, str(journal)))
        child.start()
        while not journal.exists() and child.is_alive():  # from its first release on
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.4 if train else 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        lines = journal.read_text().split() if journal.exists() else []
        if not lines:
            never += 1
            continue
        done = lines.count("released")
        ledger.refresh()
        record = ledger.dataset("kills").record.runs.get(lines[0])
        paid = record.steps if record else 0
        under += max(0, done - paid)
        released, charged = released + done, charged + paid
        if i % 50 == 0:
            bad += not verify(*ledger.store.after(0), figures=False).verified
    bad += not verify(*Ledger(url).store.after(0), figures=False).verified
    return {
        "kills": count,
        "before_the_first_release": never,
        "released": released,
        "charged": charged,
        "under_counted": under,
        "failed_verifications": bad,
    }


# -- races -------------------------------------------------------------------------------------------------------------


def race(url: str, rounds: int, start, stop, granted) -> None:
    import dpft
    from dpft.errors import BudgetError
    from dpft.ledger import Ledger

    ledger = Ledger(url)
    last = dpft.Plan(noise_multiplier=2.0, sample_rate=1.0, steps=1, delta=1e-6)
    for i in range(rounds):
        start.wait()
        try:
            ledger.dataset(f"round {i}").open(last).charge(1)
            granted.put(i)
        except BudgetError:
            pass
        stop.wait()


def races(url: str, rounds: int) -> dict:
    from dpft.ledger import Ledger
    from dpft.privacy.composition import Event, epsilon

    ledger = Ledger(url)
    start, stop, granted = SPAWN.Barrier(RACERS + 1), SPAWN.Barrier(RACERS + 1), SPAWN.Queue()
    arguments = (url, rounds, start, stop, granted)
    racers = [SPAWN.Process(target=race, args=arguments) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    one = epsilon((Event(1, 2.0, 1.0),), 1e-6)
    since, overspent, winners = time.perf_counter(), 0, 0
    for i in range(rounds):
        name = f"round {i}"
        ledger.create(name, epsilon=1.01 * one, delta=1e-6)  # one release fits, two do not
        start.wait(120)
        stop.wait(120)
        ledger.refresh()
        dataset = ledger.dataset(name)
        overspent += dataset.spent() > dataset.policy["epsilon"]
        winners += sum(run.steps for run in dataset.record.runs.values())
    for racer in racers:
        racer.join(60)
    stuck = sum(racer.exitcode != 0 for racer in racers)
    return {
        "rounds": rounds,
        "processes": RACERS,
        "granted": winners,
        "overspent": overspent,
        "stuck": stuck,
        "seconds": time.perf_counter() - since,
    }


# -- tampering ---------------------------------------------------------------------------------------------------------


def tamperings(count: int, folder: Path) -> dict:
    import dpft
    from dpft.errors import LedgerError
    from dpft.ledger import Ledger
    from dpft.ledger.database import Store
    from dpft.ledger.verify import export, read_export, verify
    from dpft.privacy.composition import Event

    path, jsonl = folder / "whole.db", folder / "whole.jsonl"
    ledger = Ledger(str(path))
    for name in ("one", "two"):
        dataset = ledger.create(name, epsilon=9.0, delta=1e-6, rows=[{"text": f"{name} {i}"} for i in range(50)])
        for i in range(20):
            dataset.spend([Event(5, 2.0 + i / 10, 0.01)], purpose=f"run {i}")
    export(ledger.store, jsonl)
    truth = ledger.store.after(0)
    key = ledger.public_key
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    random.seed(1)
    found = {"file_bytes": 0, "file_bytes_without_meaning": 0, "export_bytes": 0, "rows": 0, "unnoticed": 0}

    def judged(kind: str, read) -> None:
        try:
            rows, end = read()
            noticed = not verify(rows, end, public_key=key, figures=False).verified
        except (LedgerError, dpft.DPFTError, UnicodeDecodeError):
            noticed = True
        if noticed:
            found[kind] += 1
        elif kind == "file_bytes" and (rows, end) == truth:
            found["file_bytes_without_meaning"] += 1
        else:
            found["unnoticed"] += 1

    for i in range(count):
        copy = folder / f"copy{i}.db"
        if i % 3 == 0:
            whole = bytearray(jsonl.read_bytes())
            whole[random.randrange(len(whole))] ^= 1 << random.randrange(8)
            (folder / "copy.jsonl").write_bytes(whole)
            judged("export_bytes", lambda: read_export(folder / "copy.jsonl"))
            continue
        shutil.copy(path, copy)
        if i % 3 == 1:
            whole = bytearray(copy.read_bytes())
            whole[random.randrange(len(whole))] ^= 1 << random.randrange(8)
            copy.write_bytes(whole)
        else:
            _tamper_row(copy, len(truth[0]))
        kind = "file_bytes" if i % 3 == 1 else "rows"
        judged(kind, lambda copy=copy: Store(str(copy), create=False).after(0))
        for left in folder.glob(f"copy{i}.db*"):
            left.unlink()
    return {"tamperings": count, **found}


def _tamper_row(path: Path, rows: int) -> None:
    one, other = random.sample(range(1, rows), 2)  # so that each of these changes something
    column = random.choice(["dataset", "kind", "body", "previous", "hash", "signature"])
    statements = random.choice(
        [
            [f"DELETE FROM entries WHERE seq = {one}"],
            [f"UPDATE entries SET {column} = {column} || ' ' WHERE seq = {one}"],
            [
                f"UPDATE entries SET {column} = (SELECT {column} FROM entries WHERE seq = {rows}) || 'x' WHERE seq = "
                f"{one}"
            ],
            ["UPDATE entries SET body = replace(body, '\"count\":5', '\"count\":4')"],
            [
                f"INSERT INTO entries SELECT {rows + 1}, dataset, kind, body, hash, hash, signature FROM entries "
                f"WHERE seq = {one}"
            ],
            [f"UPDATE entries SET seq = -1 WHERE seq = {one}", f"UPDATE entries SET seq = {one} WHERE seq = {other}"]
            + [f"UPDATE entries SET seq = {other} WHERE seq = -1"],
            [f"DELETE FROM entries WHERE seq > {one}", f"UPDATE head SET seq = {one}"]
            + [f"UPDATE head SET hash = (SELECT hash FROM entries WHERE seq = {one})"],
        ]
    )
    with sqlite3.connect(path) as connection:
        for trigger in ("no_update", "no_delete"):
            connection.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            connection.execute(statement)


# -- speed -------------------------------------------------------------------------------------------------------------


def latency(url: str, present: int = 10_000, charges: int = 200) -> dict:
    from dpft.ledger import Ledger

    ledger = Ledger(url)
    run = ledger.create("speed", epsilon=1e3, delta=1e-6).open(plan(10**6))
    run.charge(1)
    missing = present - ledger.refresh().seq
    for _ in range(missing):
        run.charge(1)
    times = []
    for _ in range(charges):
        since = time.perf_counter()
        run.charge(1)
        times.append(1e3 * (time.perf_counter() - since))
    since = time.perf_counter()
    spent = Ledger(url).dataset("speed").spent()
    return {
        "entries": ledger.refresh().seq,
        "median_ms": statistics.median(times),
        "p95_ms": statistics.quantiles(times, n=20)[-1],
        "open_and_spent_s": time.perf_counter() - since,
        "spent": spent,
    }


def composition(events: int = 300) -> dict:
    """In a fresh process, so that nothing is cached."""
    code = (
        "import random, time\n"
        "from dpft.privacy.composition import Event, epsilon\n"
        "random.seed(0)\n"
        f"events = tuple(Event(int(10 ** random.uniform(1, 3)), random.uniform(0.9, 2.5), 10 ** random.uniform(-3, "
        f"-1.7)) for _ in range({events}))\n"
        "since = time.perf_counter(); first = epsilon(events, 1e-6); cold = time.perf_counter() - since\n"
        "since = time.perf_counter(); epsilon((*events, Event(100, 1.234, 0.01)), 1e-6); print(first, cold, "
        "time.perf_counter() - since)"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", "")}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    spent, cold, more = map(float, printed.stdout.split())
    return {"events": events, "epsilon": spent, "seconds": cold, "seconds_with_one_more": more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="in all, shared out over the stores")
    parser.add_argument("--rounds", type=int, default=200, help="for each store")
    parser.add_argument("--tamperings", type=int, default=1000)
    parser.add_argument("--store", action="append", choices=["sqlite", "postgresql"], help="by default both")
    options(parser)
    arguments = parser.parse_args()
    from contextlib import ExitStack

    from benchmarks.postgres import Postgres

    stores = arguments.store or ["sqlite", "postgresql"]
    found = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        os.environ["XDG_DATA_HOME"] = str(folder / "home")
        server = stack.enter_context(Postgres()) if "postgresql" in stores else None
        for store in stores:
            new = lambda what, store=store: str(folder / f"{what}.db") if store == "sqlite" else server.database()
            journals = folder / store
            journals.mkdir()
            found[store] = {"speed": latency(new("speed"))}
            print(store, found[store], file=sys.stderr, flush=True)
            found[store]["kills"] = kills(new("kills"), arguments.kills // len(stores), journals)
            print(store, found[store]["kills"], file=sys.stderr, flush=True)
            found[store]["races"] = races(new("races"), arguments.rounds)
            print(store, found[store]["races"], file=sys.stderr, flush=True)
        found["tamperings"] = tamperings(arguments.tamperings, folder)
        found["composition"] = composition()
    summed = {
        "under_counted": sum(found[store]["kills"]["under_counted"] for store in stores),
        "overspent": sum(found[store]["races"]["overspent"] for store in stores),
        "unnoticed": found["tamperings"]["unnoticed"],
    }
    text = f"{summed['under_counted']} releases under-counted, {summed['overspent']} rounds overspent, {summed['unnoticed']} tamperings unnoticed"
    deliver({**summed, **found, **circumstances()}, arguments, text)


if __name__ == "__main__":
    main()
