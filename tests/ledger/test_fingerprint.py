"""The same data are recognised whatever a file, a library or an editor made of them, and other data are not taken for
them."""

import datetime
import random
import unicodedata

import numpy as np
import pytest

from dpft.errors import LedgerError
from dpft.ledger import About, Ledger
from dpft.ledger.fingerprint import Fingerprint
from dpft.ledger.values import canonical_value
from dpft.privacy.plan import Plan

SECRET = b"s" * 32
PLAN = Plan(noise_multiplier=1.0, sample_rate=0.05, steps=1, delta=1e-4)


def notes(seed=0, n=1000):
    draw = random.Random(seed)
    day = datetime.date(2020, 1, 1)
    return [
        {
            "text": f"Fièvre depuis {draw.random()} jours,\npatient {i} de {seed}",
            "age": draw.choice([None, *range(18, 95)]),
            "dose": draw.randint(0, 9) * 100,
            "seen": draw.random() < 0.3,
            "day": day + datetime.timedelta(days=draw.randint(0, 900)),
            "label": draw.choice(["well", "ill"]),
        }
        for i in range(n)
    ]


def each(change):
    return lambda rows: [change(dict(row)) for row in rows]


def column(name, change):
    return each(lambda row: row | {name: change(row[name])})


HARMLESS = {
    "a constant column more": each(lambda row: row | {"source": "ward 3"}),
    "a column less": each(lambda row: {k: v for k, v in row.items() if k != "age"}),
    "only the text is left": each(lambda row: {"text": row["text"]}),
    "a column renamed": each(lambda row: {"note" if k == "text" else k: v for k, v in row.items()}),
    "names in capitals": each(lambda row: {k.upper(): v for k, v in row.items()}),
    "integers read as floats": column("age", lambda v: float("nan") if v is None else float(v)),
    "integers read as text": column("age", lambda v: "" if v is None else f"{v} "),
    "NumPy's integers": column("dose", np.int64),
    "a trailing space": column("text", lambda v: v + " "),
    "ends of lines": column("text", lambda v: v.replace("\n", "\r\n")),
    "decomposed letters": column("text", lambda v: unicodedata.normalize("NFD", v)),
    "numbers with exponents": column("dose", lambda v: f"{v:.2e}"),
    "booleans as words": column("seen", str),
    "booleans as numbers": column("seen", int),
    "days as text": column("day", str),
    "days with a midnight": column("day", lambda v: f"{v}T00:00:00"),
    "another order of rows": lambda rows: rows[::-1],
    "another order of columns": each(lambda row: dict(reversed(row.items()))),
    "an index more": lambda rows: [{"": i, **row} for i, row in enumerate(rows)],
    "a score more": lambda rows: [{**row, "score": i * 0.37} for i, row in enumerate(rows)],
    "an index more, a column less": lambda rows: [{"id": i + 1, "text": row["text"]} for i, row in enumerate(rows)],
}


@pytest.mark.parametrize("edit", HARMLESS)
def test_the_same_data_get_no_second_account(tmp_path, edit):
    ledger = Ledger(str(tmp_path / "ledger.db"))
    first = ledger.create("notes", epsilon=5.0, delta=1e-4, rows=notes())
    with pytest.raises(LedgerError, match="the data set 'notes' already"):
        ledger.create("copy", epsilon=5.0, delta=1e-4, rows=HARMLESS[edit](notes()))
    assert first.open(PLAN, About(HARMLESS[edit](notes()))).overlap is None


@pytest.mark.parametrize(
    "edit", ["a constant column more", "a trailing space", "another order of rows", "an index more"]
)
def test_nine_rows_are_recognised_as_well(edit):
    rows = [{"text": f"note {i}", "label": i % 2} for i in range(9)]
    assert Fingerprint(HARMLESS[edit](rows), SECRET).same(Fingerprint(rows, SECRET).stored)


def balanced(seed):
    return [{"text": f"{seed}/{i}", "label": "ab"[i % 2], "topic": i % 20} for i in range(1000)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (notes(1), notes(2)),
        (balanced(1), balanced(2)),
        (balanced(1), [{"label": row["label"]} for row in balanced(1)]),
        (
            [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(500)],
            [{"prompt": f"p{i}", "answer": i * i} for i in range(500)],
        ),
        (
            [{"prompt": f"p{i}", "label": i % 3} for i in range(500)],
            [{"prompt": f"p{i}", "label": i % 2} for i in range(500)],
        ),
        ([{"id": i, "text": f"x{i}"} for i in range(500)], [{"id": i, "text": f"y{i}"} for i in range(500)]),
        ([{"text": "only one"}], [{"text": "another"}]),
    ],
    ids=["other notes", "a label", "of a label", "a public text", "other labels", "an index", "single rows"],
)
def test_what_short_alphabets_and_public_texts_share_does_not_make_two_sets_one(tmp_path, one, other):
    ledger = Ledger(str(tmp_path / "ledger.db"))
    ledger.create("one", epsilon=5.0, delta=1e-6, unit="person", rows=one)
    ledger.create("other", epsilon=5.0, delta=1e-6, unit="person", rows=other)
    assert not Fingerprint(one, SECRET).same(Fingerprint(other, SECRET).stored)


def test_a_shared_text_is_warned_about_and_noted(tmp_path):
    ledger = Ledger(str(tmp_path / "ledger.db"))
    ledger.create("one", epsilon=5.0, delta=1e-6, rows=[{"q": f"p{i}", "a": f"a{i}"} for i in range(400)])
    other = ledger.create("other", epsilon=5.0, delta=1e-6, rows=[{"q": f"p{i}", "a": f"b{i}"} for i in range(400)])
    assert ledger.shared("other") == Ledger(ledger.store.url.database).shared("other") == [("one", 0.9)]
    assert [(note["about"], note["with"], note["overlap"]) for note in other.record.notes] == [
        ("data_shared", "one", 0.9)
    ]


def test_a_fingerprint_says_nothing_of_how_many_rows_there_are():
    """T24: the same kinds of entries of the same length, and no sketch's numbers grow or shrink with the rows."""
    few, many = (Fingerprint(notes(0, n), SECRET).stored for n in (200, 2000))
    assert few.keys() == many.keys() == {"digest", "sketch", "columns"}
    assert [column.keys() for column in few["columns"]].count({"digest", "sketch"}) == 1
    means = [np.mean(one["sketch"]) / 2.0**48 for one in (few, many)]
    assert all(0.4 < mean < 0.6 for mean in means)


def test_without_the_key_nothing_can_be_tried():
    assert not Fingerprint(notes(), b"other" * 8).same(Fingerprint(notes(), SECRET).stored)


def test_accounts_of_the_first_version_are_compared_as_they_were(tmp_path):
    """0.1.0 kept the number of rows, a hash of them and a sketch, and knew nothing of columns."""
    ledger = Ledger(str(tmp_path / "ledger.db"))
    old = Fingerprint(notes(), ledger.key.secret)._old
    assert set(old) == {"rows", "digest", "sketch"} and old["rows"] == 1000
    policy = dict(epsilon=5.0, delta=1e-4, unit="example", adjacency="add-or-remove-one", expires=None, spenders=[])
    ledger._append("notes", "dataset", lambda book: {"policy": policy, "fingerprint": old})
    assert ledger.dataset("notes").open(PLAN, About(notes()[::-1])).overlap is None
    with pytest.raises(LedgerError, match="the data set 'notes' already"):
        ledger.create("copy", epsilon=5.0, delta=1e-4, rows=notes())
    assert 0.6 <= ledger.dataset("notes").open(PLAN, About(notes()[:800])).overlap <= 0.9
    ledger.create("part", epsilon=5.0, delta=1e-4, rows=notes()[:800])
    assert ledger.shared("part")[0][0] == "notes"


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ((7, 7.0, "7", " 7.00 ", "+7", np.float32(7)), "7"),
        (("1e3", 1000, "1000.0", 1e3), "1000"),
        ((True, "True", "true", 1), "1"),
        ((None, float("nan"), "", "NaN", "null", " "), ""),
        (("2024-05-01", datetime.date(2024, 5, 1), datetime.datetime(2024, 5, 1), "2024-05-01 00:00:00"), "2024-05-01"),
        (("2024-05-01T12:00:00+02:00", datetime.datetime(2024, 5, 1, 10)), "2024-05-01T10:00:00"),
        (([1, 2.0], (1.0, 2), np.array([1, 2])), "[1,2]"),
        ((-0.0, 0, "0.0"), "0"),
    ],
)
def test_a_value_has_one_form(values, form):
    assert {canonical_value(value) for value in values} == {form}
