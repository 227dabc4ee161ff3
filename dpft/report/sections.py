"""The sections of a sweep's page: each a finding in words, a figure or none, and the data as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import spearmanr

from dpft.privacy.rounding import rounded_down, rounded_up
from dpft.report import sweep_plots
from dpft.report.card import VERDICTS
from dpft.report.summary import SIGNIFICANCE, Summary, Trend, at, budget, listed, number, signed
from dpft.runs.folder import RunFolder
from dpft.runs.record import read_json
from dpft.runs.sweep import NON_PRIVATE, PRIVATE, Cell

NONE = "–"
LONG = 12  # rows: a longer table is folded, unless it is shaded and so a figure itself


@dataclass(frozen=True)
class Table:
    """Rows of texts; all columns but the first ``texts`` hold numbers.

    Attributes:
        shade: for each row and column how dark it is, from 0 to 1; None for not at all.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    shade: Sequence[Sequence[float | None]] = ()

    @property
    def is_long(self) -> bool:
        return len(self.rows) > LONG and not self.shade

    def shaded(self, row: int, column: int) -> float | None:
        return self.shade[row][column] if self.shade else None


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: of its figure's file.
        legend: whether the subsets' numbers are explained: by ``"colours"``, ``"numbers"``, or not at all.
    """

    name: str
    title: str
    findings: Sequence[str]
    figure: str | None = None
    tables: Sequence[tuple[str, Table]] = field(default=())
    legend: str = ""


def all_of(summary: Summary, runs: Path) -> Iterator[Section]:
    """Every section for which the sweep has something to show.

    Args:
        runs: from where the runs' folders are found.
    """
    made = (utility, size, classes, groups, calibration)
    yield from filter(None, (make(summary) for make in made))
    yield from filter(None, (memorisation(summary, runs), resources(summary)))


def utility(summary: Summary) -> Section | None:
    """The headline against ε."""
    metric = _words(summary.metric)
    best = [(e, *found) for e in summary.budgets if (found := summary.best(e)) is not None]
    if not best:
        return None
    (low, _, first), (high, _, last) = best[0], best[-1]
    said = []
    if len(best) > 1:
        way = "better" if summary.better(last.mean, first.mean) else "worse"
        gap = abs(last.mean - first.mean)
        beside = f"{way} than the best {at(low)}, by {number(gap)}" if gap else f"as good as the best {at(low)}"
        said.append(f"The best setting {at(high)} is {beside}.")
    if summary.untouched is not None:
        said.append(f"The untouched model has {summary.untouched}.")
    if summary.majority is not None:
        said.append(f"Always naming the most frequent class has {number(summary.majority)}.")
    rows = [
        [f"{place} {name}", _count(summary.parameters[name]), *(_figure(summary.at(name, e)) for e in summary.budgets)]
        for place, name in enumerate(summary.subsets, 1)
    ]
    table = Table(["subset", "parameters", *map(budget, summary.budgets)], rows)
    title = f"{_title(metric)} against ε"
    listing = "; ".join(f"{one} {at(e)} with {name}" for e, name, one in best)
    figure = sweep_plots.over_epsilon(
        summary, f"{title}, one line for each subset. Best: {listing}. {' '.join(said)}".rstrip()
    )
    return Section("utility", title, said, figure, [(f"{_title(metric)} over seeds", table)], "colours")


VERDICT_WORDS = {
    "fewer": "Fewer parameters are better",
    "more": "More parameters are better",
    "neither": "Neither fewer nor more parameters are better throughout",
    "open": "The seeds do not tell which are better",
}


def size(summary: Summary) -> Section | None:
    """The headline against the number of trainable parameters (Luo, Wu, Adeli, Fei-Fei 2021)."""
    trends, controls = summary.trends(), summary.controls()
    if not trends and not controls:
        return None
    how = (
        f"Two subsets are told apart where their means differ by Welch's t-test over seeds at {SIGNIFICANCE:.0%}; one "
        "seed tells nothing apart. A budget has an answer if a quarter of the pairs of different sizes are told apart "
        "and three quarters of these agree."
    )
    said = [*([overall(trends), how] if trends else []), *controls]
    rows = [
        [
            budget(trend.epsilon),
            f"{trend.pairs}",
            NONE if trend.told_apart is None else f"{trend.told_apart}",
            NONE if trend.told_apart is None else f"{trend.fewer_won}",
            NONE if trend.correlation is None else signed(trend.correlation, 2),
        ]
        for trend in trends
    ]
    head = ["", "pairs", "told apart", "the smaller is better in", "rank correlation with having fewer"]
    metric = _words(summary.metric)
    figure = sweep_plots.over_parameters(
        summary, f"{_title(metric)} against the number of trainable parameters, one line for each budget. {said[0]}"
    )
    tables = [("Subsets of different sizes, compared", Table(head, rows))] if rows else []
    return Section("size", "Are fewer parameters better?", said, figure, tables, "numbers")


def overall(trends: Sequence[Trend]) -> str:
    """What the trends say together, in one sentence."""
    parts = []
    for verdict, said in VERDICT_WORDS.items():
        where = [at(trend.epsilon) for trend in trends if trend.verdict == verdict]
        if where:
            parts.append(f"{said} {listed(where)}")
    return "; ".join([parts[0], *(part[0].lower() + part[1:] for part in parts[1:])]) + "."


def classes(summary: Summary) -> Section | None:
    """Each class's F1 at each budget."""
    counts = summary.parts("per_class")
    if not counts:
        return None
    lost = summary.lost("per_class", "f1")
    said = []
    most = [f"{name} ({number(loss)}, {counts[name]:,} examples)" for name, loss in lost.items() if loss > 0][:3]
    if most:
        said.append(f"F1 falls most for {listed(most)}, {at(summary.budgets[0])} beside {budget(summary.reference)}.")
    if len(lost) > 2 and len(set(lost.values())) > 1 and len({counts[name] for name in lost}) > 1:
        rho = float(spearmanr([counts[name] for name in lost], list(lost.values()))[0])
        who = {-1: "rare classes lose more", 0: "rarity hardly matters", 1: "frequent classes lose more"}
        said.append(
            f"Rank correlation between a class's examples and what it loses: {signed(rho, 2)}; {who[_sign(rho, 0.3)]}."
        )
    said.append(f"{_of_chosen(summary)} The most frequent class is first.")
    return Section("classes", "Classes", said, tables=[("F1 of each class", _parts(summary, "per_class", "f1", lost))])


def groups(summary: Summary) -> Section | None:
    """Each group's accuracy at each budget."""
    counts = summary.parts("groups")
    if not counts:
        return None
    said = []
    for e in summary.budgets:
        found = {name: one.mean for name in counts if (one := summary.part("groups", name, "accuracy", e)) is not None}
        if len(found) > 1 and e in (summary.budgets[0], summary.reference):
            worst, best = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
            said.append(
                f"{_title(at(e))} accuracy lies between {number(found[worst])} ({worst}) and {number(found[best])} "
                f"({best}), a gap of {number(found[best] - found[worst])}."
            )
    least = min(counts, key=lambda name: counts[name])
    error = number(min(1.0, max(1, counts[least]) ** -0.5))
    said.append(
        f"An accuracy over {counts[least]:,} example{'s' * (counts[least] != 1)} ({least}) is known to about ±{error}."
    )
    said.append(_of_chosen(summary))
    table = _parts(summary, "groups", "accuracy", summary.lost("groups", "accuracy"))
    column = summary.sweep.recipe.get("task", {}).get("group")
    return Section(
        "groups", f"Groups of {column}" if column else "Groups", said, tables=[("Accuracy of groups", table)]
    )


def calibration(summary: Summary) -> Section | None:
    """How far confidence and accuracy lie apart."""
    bins = {e: found for e in summary.budgets if (found := summary.reliability(e))}
    if not bins or summary.chosen is None:
        return None
    ends = list(dict.fromkeys([summary.budgets[0], *summary.epsilons[-1:], summary.budgets[-1]]))
    rows, said = [], []
    for e, found in bins.items():
        gap = sum(n * (confidence - right) for confidence, right, n in found) / sum(n for _, _, n in found)
        error = _figure(summary.at(summary.chosen, e, "ece"))
        rows.append([budget(e), error, signed(gap)])
        if e in ends:
            way = {-1: "less confident than it is right", 0: "as confident as it is right"}
            said.append(
                f"{_title(at(e))} the expected calibration error is {error}, and the model is on average "
                f"{way.get(_sign(gap, 0.01), 'more confident than it is right')}."
            )
    drawn = [e for e in ends if e in bins]
    figure = sweep_plots.reliability(summary, drawn, f"Reliability diagram of {summary.chosen}. {' '.join(said)}")
    each = [[budget(e), number(c), number(a), f"{n:,}"] for e in bins for c, a, n in bins[e]]
    tables = [
        ("Calibration", Table(["", "expected calibration error", "confidence less accuracy"], rows)),
        ("Every bin", Table(["", "confidence", "accuracy", "examples"], each)),
    ]
    return Section("calibration", "Calibration", [*said, _of_chosen(summary)], figure, tables)


def memorisation(summary: Summary, runs: Path) -> Section | None:
    """What audits with canaries found in the runs' folders."""
    audits = [(cell, found) for cell in summary.sweep.cells if (found := _audit(cell, runs)) is not None]
    if not audits:
        return None
    rows = [
        [
            cell.subset,
            budget(cell.epsilon),
            str(cell.seed),
            found["verdict"],
            f"{found['canaries']:,}",
            f"≥ {rounded_down(found['epsilon_lower_bound'])}",
            NONE if found["claimed"] is None else rounded_up(found["claimed"]),
            f"{found['auc']:.3f}",
        ]
        for cell, found in audits
    ]
    verdicts = [found["verdict"] for _, found in audits]
    said = [
        f"{verdicts.count(one)} of {len(audits)} audited runs: {one}, {VERDICTS[one]}."
        for one in dict.fromkeys(verdicts)
    ]
    said.append("An audit can refute a claim; it never proves one.")
    head = ["subset", "", "seed", "verdict", "canaries", "ε shown", "ε claimed", "AUC"]
    return Section("memorisation", "Memorisation of canaries", said, tables=[("Audits", Table(head, rows, 4))])


def resources(summary: Summary) -> Section | None:
    """Time and memory of each subset; there are none on a page for publication."""
    scales = {"seconds": 1.0, "peak_memory": 2.0**30}
    names = {"seconds": "seconds", "peak_memory": "peak memory in GiB"}
    found = {
        f"{names[key]}, {kind}": {
            name: one.mean / scale for name in summary.subsets if (one := summary.resource(name, kind, key)) is not None
        }
        for key, scale in scales.items()
        for kind in (PRIVATE, NON_PRIVATE)
    }
    kept = {head: values for head, values in found.items() if values}
    if not kept:
        return None
    rows = [
        [name, *(number(values[name]) if name in values else NONE for values in kept.values())]
        for name in summary.subsets
    ]
    shade = [
        [None, *(_share(values.get(name), max(values.values())) for values in kept.values())]
        for name in summary.subsets
    ]
    said = []
    for head, values in kept.items():
        least, most = min(values, key=lambda name: values[name]), max(values, key=lambda name: values[name])
        span = f"from {number(values[least])} ({least}) to {number(values[most])} ({most})"
        said.append(f"Mean {head}: {span if values[least] < values[most] else number(values[least])}.")
    return Section(
        "resources", "Time and memory", said, tables=[("Time and memory", Table(["subset", *kept], rows, 1, shade))]
    )


def _parts(summary: Summary, metric: str, figure: str, lost: dict[str, float]) -> Table:
    """A class or group a row, a budget a column; the better the darker, and last what is lost."""
    rows, shade = [], []
    for name, count in summary.parts(metric).items():
        values = [summary.part(metric, name, figure, e) for e in summary.budgets]
        rows.append([name, f"{count:,}", *("–" if one is None else f"{one.mean:.2f}" for one in values)])
        shade.append([None, None, *(None if one is None else one.mean for one in values)])
        if lost:
            rows[-1].append(signed(-lost[name], 2) if name in lost else NONE)
            shade[-1].append(None)
    change = [f"{budget(summary.budgets[0])} less {budget(summary.reference)}"] if lost else []
    head = ["class" if metric == "per_class" else "group", "examples", *map(budget, summary.budgets), *change]
    return Table(head, rows, 1, shade)


def _audit(cell: Cell, runs: Path) -> dict | None:
    file = RunFolder(runs / cell.folder).audit_file if cell.folder is not None else None
    return read_json(file) if file is not None and file.exists() else None


def _of_chosen(summary: Summary) -> str:
    return f"These are figures of the subset {summary.chosen}, which does best over all budgets."


def _sign(value: float, least: float) -> int:
    """-1 or 1, or 0 for what is smaller than ``least`` either way."""
    return 0 if abs(value) < least else 1 if value > 0 else -1


def _share(value: float | None, most: float) -> float | None:
    return None if value is None or most <= 0 else value / most


def _figure(one: object) -> str:
    return NONE if one is None else str(one)


def _count(number: int | None) -> str:
    return NONE if number is None else f"{number:,}"


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _title(text: str) -> str:
    return text[0].upper() + text[1:]
