"""Nobody overspends: charges come first, compose, and are granted once."""

import multiprocessing
import threading
from datetime import UTC, date, datetime, timedelta

import pytest

from dpft.errors import BudgetError, GuaranteeError, LedgerError, PlanError
from dpft.ledger import About, Ledger, Run
from dpft.ledger import ledger as ledger_module
from dpft.ledger.verify import verify
from dpft.privacy import composition
from dpft.privacy.composition import Event, reference
from dpft.privacy.plan import Plan
from dpft.privacy.rounding import rounded_up

PLAN = Plan(noise_multiplier=1.0, sample_rate=0.05, steps=100, delta=1e-4)


@pytest.fixture
def notes(ledger):
    return ledger.create("notes", epsilon=5.0, delta=1e-4)


def test_a_run_is_charged_before_and_settled_after(ledger, notes, url):
    run = notes.open(PLAN, About(purpose="first", model="smollm2"))
    assert notes.spent() == 0 and not notes.curve()  # to open costs nothing and leaves nothing
    run.charge(40)
    others = Ledger(url).dataset("notes")
    assert others.spent() == pytest.approx(reference((Event(40, 1.0, 0.05),), 1e-4), rel=2e-3)
    run.charge(40)
    run.settle(63)
    assert others.spent() == pytest.approx(reference((Event(63, 1.0, 0.05),), 1e-4), rel=2e-3)
    (shown,) = others.curve()
    assert shown["steps"] == 63 and shown["settled"] and shown["purpose"] == "first" and shown["by"]["user"]
    assert others.second_opinion() > others.spent()


def test_a_killed_run_stays_at_what_was_reserved_and_a_resumed_one_charges_again(notes):
    run = notes.open(PLAN)
    run.charge(50)
    again = notes.open(PLAN, resumed=run.id)
    again.charge(50)
    assert [(r["steps"], r["settled"]) for r in notes.curve()] == [(100, False)]
    again.settle(30)
    assert notes.record.runs[run.id].steps == 80
    third = notes.open(PLAN, resumed=run.id)
    third.charge(10)  # what was given back stays so
    assert notes.record.runs[run.id].steps == 90
    with pytest.raises(LedgerError, match="knows no run 123"):
        notes.open(PLAN, resumed="123")


def test_copies_of_a_run_that_go_on_count_all_that_each_released(ledger, notes, url):
    """T15: a folder restored from a backup, or copied to try another rate, goes on from the same step."""
    first = notes.open(PLAN)
    first.charge(20)
    first.settle(20)
    one, two = (
        notes.open(PLAN, resumed=first.id, released=20),
        Ledger(url).dataset("notes").open(PLAN, resumed=first.id),
    )
    one.charge(15)
    two.charge(12)
    one.settle(13)
    assert notes.record.runs[first.id].steps == 20 + 13 + 12
    two.settle(10)
    ledger.refresh()
    assert notes.record.runs[first.id].steps == 20 + 13 + 10
    assert notes.spent() == pytest.approx(reference((Event(43, 1.0, 0.05),), 1e-4), rel=2e-3)
    assert verify(*ledger.store.after(0)).verified


def test_a_resumed_run_stays_within_the_budget(ledger):
    """What was given back is not charged again by the next charge, which was granted without it."""
    tight = ledger.create("tight", epsilon=reference((Event(100, 1.0, 0.05),), 1e-4) * 1.001, delta=1e-4)
    run = tight.open(PLAN)
    run.charge(10)
    run.settle(7)
    again = tight.open(PLAN, resumed=run.id, released=7)
    again.charge(93)
    assert tight.spent() <= tight.policy["epsilon"] and verify(*ledger.store.after(0)).verified


def test_a_killed_run_that_fills_its_account_goes_on_to_the_last_step_that_fits(ledger):
    tight = ledger.create("tight", epsilon=reference((Event(100, 1.0, 0.05),), 1e-4) * 1.001, delta=1e-4)
    tight.open(PLAN).charge(10)  # of which 7 were released when it was killed
    again = tight.open(PLAN, resumed=next(iter(tight.record.runs)), released=7)
    with pytest.raises(BudgetError, match="90 do"):
        again.charge(93)
    again.charge(90)
    with pytest.raises(GuaranteeError, match="executed -1"):
        again.settle(-1)
    again.settle(90)
    with pytest.raises(BudgetError, match="not one step fits.$"):
        tight.open(PLAN, resumed=again.id, released=97)
    tight.open(PLAN, resumed=again.id, released=100)  # to save what a killed run has released


@pytest.mark.parametrize(
    "event",
    [
        dict(epsilon=0.5, delta=-1e-3),
        dict(epsilon=-0.5, delta=0.0),
        dict(epsilon=float("nan"), delta=0.0),
        dict(epsilon=1.0, delta=1.0),
        dict(epsilon=1.0),
        dict(noise_multiplier=-1.0, sample_rate=0.1),
        dict(noise_multiplier=1.0, sample_rate=0.0),
        dict(noise_multiplier=1.0, sample_rate=2.0),
        dict(noise_multiplier=1.0, sample_rate=0.1, count=-5),
        {},
    ],
)
def test_no_entry_makes_what_was_spent_less(event):
    """T15: a negative δ on record would be subtracted from all that is spent later."""
    with pytest.raises(PlanError, match="A release has"):
        Event(**event)


def test_runs_compose_with_all_that_went_before(notes):
    notes.spend([Event(100, 1.0, 0.05)], purpose="one")
    notes.spend([Event(1, None, None, 0.3, 1e-9)], purpose="another tool")
    events = (Event(100, 1.0, 0.05), Event(50, 2.0, 0.1), Event(1, None, None, 0.3, 1e-9))
    assert notes.spend([Event(50, 2.0, 0.1)], purpose="two") == pytest.approx(reference(events, 1e-4), rel=2e-3)


def test_what_does_not_fit_is_refused_with_what_does(notes):
    plan = Plan(noise_multiplier=1.0, sample_rate=0.05, steps=3000, delta=1e-4)
    most, noise = notes.most_steps(plan), notes.least_noise(plan)
    with pytest.raises(
        BudgetError,
        match=rf"at most {most:,} of 3,000 steps fit, or all of them with a noise multiplier of {rounded_up(noise, 4)}",
    ):
        notes.open(plan)
    assert not notes.curve()
    event = lambda n, sigma=1.0: (Event(n, sigma, 0.05),)
    assert notes.fits(event(most)) and not notes.fits(event(most + 1))
    assert notes.fits(event(3000, noise)) and not notes.fits(event(3000, noise * 0.99))


def test_a_charge_beyond_the_budget_is_refused_and_leaves_nothing(ledger, notes):
    run = notes.open(PLAN)
    run.charge(100)
    before = ledger.refresh().seq
    with pytest.raises(BudgetError, match="more releases do not fit"):
        run.charge(10_000)
    with pytest.raises(GuaranteeError, match="executed 101 releases and was charged 100"):
        run.settle(101)
    with pytest.raises(BudgetError, match="spend less"):
        notes.spend([Event(1, None, None, 4.9, 0.0)], purpose="too much")
    assert ledger.refresh().seq == before


def test_a_release_without_noise_is_never_paid_for(notes):
    with pytest.raises(BudgetError, match="to inf"):
        notes.open(Plan(noise_multiplier=0.0, sample_rate=0.05, steps=1, delta=1e-4))


def test_a_figure_is_of_the_moment_at_which_it_is_written(ledger, notes, url, monkeypatch):
    """Somebody charges while a settlement is being composed."""
    run, other = notes.open(PLAN), Ledger(url).dataset("notes").open(PLAN)
    run.charge(50)
    compose, calls = composition.epsilon, []

    def meanwhile(*facts):
        found = compose(*facts)
        if not calls:
            calls.append(facts)
            other.charge(20)
        return found

    monkeypatch.setattr(composition, "epsilon", meanwhile)
    run.settle(40)
    assert calls and verify(*ledger.store.after(0)).verified
    assert notes.record.runs[run.id].settled["epsilon"] == notes.spent()


def test_the_account_is_kept_for_one_unit_and_adjacency(notes):
    for change in ({"unit": "patient"}, {"adjacency": "replace-one"}):
        with pytest.raises(GuaranteeError, match=next(iter(change))):
            notes.open(Plan(noise_multiplier=1.0, sample_rate=0.05, steps=1, delta=1e-4, **change))


def test_the_policy_is_kept(ledger, monkeypatch):
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    old = ledger.create("old", epsilon=1.0, delta=1e-6, expires=yesterday)
    with pytest.raises(LedgerError, match=f"ended on {yesterday}"):
        old.open(PLAN)
    old.amend(expires=date(2999, 1, 1).isoformat(), epsilon=7.0)
    old.open(PLAN).charge(100)
    with pytest.raises(BudgetError, match="cannot be lowered"):
        old.amend(epsilon=0.1)
    hers = ledger.create("hers", epsilon=3.0, delta=1e-4, spenders=["ann"])
    with pytest.raises(LedgerError, match="its policy names ann"):
        hers.open(PLAN)
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    hers.open(PLAN)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (dict(epsilon=0, delta=1e-6), "epsilon is 0"),
        (dict(epsilon=1, delta=1.5), "delta is 1.5"),
        (dict(epsilon=1, delta=1e-6, adjacency="both"), "adjacency is 'both'"),
        (dict(epsilon=1, delta=0.01), "permits publishing one whole"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(ledger, rows, facts, said):
    with pytest.raises(PlanError, match=said):
        ledger.create("notes", rows=rows, **facts)


def test_data_are_recognised_by_their_rows(ledger, rows, monkeypatch):
    notes = ledger.create("notes", epsilon=5.0, delta=1e-4, rows=rows)
    with pytest.raises(LedgerError, match="the data set 'notes' already"):
        ledger.create("copy", epsilon=5.0, delta=1e-4, rows=rows[::-1])
    changed = rows[:150] + [{"text": "new", "patient": str(i)} for i in range(50)]
    run = notes.open(PLAN, About(changed))
    assert 0.4 < run.overlap < 0.8  # 150 of 250
    run.charge(1)
    assert [note["about"] for note in notes.record.notes] == ["data_changed"]
    with pytest.raises(LedgerError, match="nothing in common"):
        notes.open(PLAN, About([{"text": f"other {i}"} for i in range(50)]))
    more = ledger.create("more", epsilon=5.0, delta=1e-4, rows=changed)
    assert ledger.shared("more")[0][0] == "notes"
    with pytest.raises(LedgerError, match="are the data set 'notes', not 'more'"):
        more.open(PLAN, About(rows))
    monkeypatch.setattr(
        "dpft.ledger.fingerprint.overlap", lambda *_: 1.0
    )  # an estimate, which a few new rows may not change
    ledger.create("y2025", epsilon=5.0, delta=1e-4, rows=[*rows, {"text": "new", "patient": "new"}])
    assert ledger.shared("y2025") == [("notes", 0.9), ("more", 0.9)]
    text = str([vars(row) for row in ledger.store.after(0)[0]])
    assert "note 7" not in text and "p7" not in text


def test_names_are_unique_and_unknown_ones_are_named(ledger, notes):
    with pytest.raises(LedgerError, match="already"):
        ledger.create("notes", epsilon=1.0, delta=1e-6)
    with pytest.raises(LedgerError, match="no data set 'nodes': it has notes"):
        ledger.dataset("nodes")


def test_a_clock_that_was_set_back_is_refused(notes, monkeypatch):
    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr(ledger_module, "datetime", Past)
    with pytest.raises(LedgerError, match="clock says 2020-01-01"):
        notes.open(PLAN).charge(1)
    assert notes.spent() == 0


def test_without_its_key_a_ledger_can_be_read_and_not_charged(notes, url, home, tmp_path, monkeypatch):
    (key,) = (home / "keys").glob("*.key")
    assert key.stat().st_mode & 0o077 == 0
    key.rename(tmp_path / "team.key")
    other = Ledger(url).dataset("notes")
    assert other.spent() == 0
    with pytest.raises(LedgerError, match="copy it there from whoever made"):
        other.open(PLAN).charge(1)
    monkeypatch.setenv("DPFT_LEDGER_KEY", str(tmp_path / "team.key"))
    Ledger(url).dataset("notes").open(PLAN).charge(1)
    Ledger(str(tmp_path / "second.db"))  # a team's key may sign several ledgers
    assert Ledger(url).dataset("notes").spent() > 0


def race(url, start, granted):
    run = Ledger(url).dataset("last").open(Plan(noise_multiplier=2.0, sample_rate=0.1, steps=1, delta=1e-6))
    start.wait()
    for _ in range(3):
        try:
            run.charge(2)
            granted.put(2)
        except BudgetError:
            return


def test_the_last_of_the_budget_is_granted_once(ledger, url):
    """T15: writers that ask at the same time."""
    last = ledger.create("last", epsilon=1.0, delta=1e-6)
    most = last.most_steps(Plan(noise_multiplier=2.0, sample_rate=0.1, steps=1000, delta=1e-6))
    last.spend([Event(most - 5, 2.0, 0.1)], purpose="nearly all")
    context = multiprocessing.get_context("spawn")
    start, granted = context.Barrier(4), context.Queue()
    racers = [context.Process(target=race, args=(url, start, granted)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert granted.qsize() == 2  # four of the five releases that were left, two at a time
    assert last.spent() <= 1.0


def test_a_reader_sees_entries_and_end_of_one_moment(ledger, notes, url):
    run = notes.open(PLAN)
    writer = threading.Thread(target=lambda: [run.charge(1) for _ in range(100)])
    reader = Ledger(url)
    writer.start()
    while writer.is_alive():
        reader.refresh()
    writer.join()
    assert reader.dataset("notes").record.runs[run.id].steps == 100


def test_times_are_told_to_the_hour(ledger, notes, monkeypatch):
    """T24: what lies between two charges is the time that the data took; the opening's time is nobody's."""
    moment = [datetime(2099, 3, 1, 13, 47, 12, 5, tzinfo=UTC)]

    class Now(datetime):
        @classmethod
        def now(cls, tz=None):
            return moment[0]

    monkeypatch.setattr(ledger_module, "datetime", Now)
    run = notes.open(PLAN)
    for minutes in (0, 3, 9, 20):
        moment[0] += timedelta(minutes=minutes, seconds=1, microseconds=7)
        run.charge(1)
    run.settle(4)
    letters = ledger.create("letters", epsilon=1.0, delta=1e-6)
    letters.spend([Event(1, 9.0, 0.1)], purpose="counts")
    at = [row.facts["at"] for row in ledger.store.after(0)[0]]
    assert at[2:8] == ["2099-03-01T13:00:00+00:00"] * 4 + ["2099-03-01T14:00:00+00:00"] * 2
    assert at[8] == moment[0].isoformat(timespec="microseconds") and at[1:] == sorted(at[1:])
    moment[0] -= timedelta(hours=2)
    with pytest.raises(LedgerError, match="clock says 2099-03-01T12"):
        letters.spend([Event(1, 9.0, 0.1)], purpose="counts")


def test_a_plan_for_more_units_than_delta_allows_is_refused(ledger):
    """T17: δ = 0.01 for 100,000 units permits publishing a thousand of them."""
    loose = ledger.create("loose", epsilon=5.0, delta=0.01)
    before = ledger.refresh().seq
    plan = lambda units: Plan(noise_multiplier=1.0, sample_rate=0.05, steps=100, delta=1e-6, units=units)
    with pytest.raises(GuaranteeError, match="The delta of the account 'loose' is 0.01 for 100 units"):
        loose.open(plan(100))
    assert ledger.refresh().seq == before
    run = loose.open(plan(99))
    run.charge(1)
    assert loose.record.runs[run.id].facts["units"] == 99


@pytest.mark.parametrize("change", [{"delta": 1e-2}, {"adjacency": "zero-out"}, {"unit": "patient", "epsilon": 6.0}])
def test_by_what_releases_are_priced_is_never_amended(ledger, notes, change):
    """T15: ε = 3.21 became 2.13 by another δ."""
    notes.spend([Event(100, 1.0, 0.05)], purpose="one")
    before, seq = notes.spent(), ledger.refresh().seq
    with pytest.raises(LedgerError, match="cannot be amended"):
        notes.amend(**change)
    assert (notes.spent(), ledger.refresh().seq) == (before, seq)
    ledger._append("notes", "amend", lambda book: {"policy": change})  # by somebody with the key
    problems = verify(*ledger.store.after(0), figures=False).problems
    assert any("re-prices what was released" in problem for problem in problems)


def test_figures_are_never_printed_below_what_was_computed(notes):
    notes.spend([Event(100, 1.0, 0.05)], purpose="one")
    spent = notes.spent()
    with pytest.raises(BudgetError) as refused:
        notes.open(Plan(noise_multiplier=1.0, sample_rate=0.05, steps=3000, delta=1e-4))
    said = float(str(refused.value).split("from ε = ")[1].split()[0])
    assert spent <= said <= spent * 1.001


def test_a_run_is_not_resumed_for_other_releases(notes):
    """T15: what a weak kind gives back must not be taken from a strong one, of which all was released."""
    run = notes.open(PLAN)
    run.charge(10)
    other = Plan(noise_multiplier=0.8, sample_rate=0.05, steps=100, delta=1e-4)
    with pytest.raises(GuaranteeError, match="charged for other releases"):
        notes.open(other, resumed=run.id, released=5)


def test_releases_of_which_a_part_no_longer_fits_are_not_charged_at_all(ledger, notes, url, monkeypatch):
    """Somebody else spends between two kinds of releases of one entry."""
    other = Ledger(url).dataset("notes")
    charge, calls = Run.charge, []

    def meanwhile(self, count):
        calls.append(count)
        if len(calls) == 2:
            other.spend([Event(1, epsilon=3.0, delta=0.0)], purpose="faster")
        charge(self, count)

    monkeypatch.setattr(Run, "charge", meanwhile)
    with pytest.raises(BudgetError, match="do not fit"):
        notes.spend([Event(1, epsilon=0.5, delta=0.0), Event(2, epsilon=1.4, delta=0.0)], purpose="slower")
    ledger.refresh()
    assert notes.spent() == pytest.approx(3.0, rel=1e-3) and verify(*ledger.store.after(0)).verified
