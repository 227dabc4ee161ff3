"""The privacy card: what a run claims, what it released and what must stay private, for people who sign for it."""

import math
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, Undefined, select_autoescape

from dpft.privacy import accounting, composition
from dpft.privacy.events import to_dp_event
from dpft.privacy.rounding import percent_up, rounded_down, rounded_up
from dpft.report.meaning import Meaning, meaning
from dpft.report.plots import Labels, line, roc, trade_off
from dpft.runs.folder import RunFolder
from dpft.runs.record import RunRecord, read_json

TEMPLATES = Path(__file__).parent / "templates"
ADJACENCY_WORDS = {
    "add-or-remove-one": "two data sets that differ by adding or removing one unit",
    "replace-one": "two data sets that differ by replacing one unit",
    "zero-out": "two data sets that differ by blanking one unit",
}
LARGEST_EXPONENT = 700  # of e; beyond it a float is infinite

VERDICTS = {
    "VIOLATION": "what was measured contradicts the claim",
    "consistent": "nothing contradicts the claim; that is no proof of it",
    "uninformative": "the attack shows too little to say anything about the claim",
}


def write_card(folder: Path | str) -> tuple[Path, Path]:
    """Make ``card.md`` and ``card.html`` from the run's record; ε is derived from its events again.

    Raises:
        RecipeError: the folder holds no run, or what it holds is damaged.
        PlanError: its record names a release that this version does not know.
    """
    files = RunFolder(folder)
    run = files.record()
    facts, templates = _facts(run), environment()
    facts["audit"] = read_json(files.audit_file) if files.audit_file.exists() else None
    facts["roc"] = _roc(facts["audit"], facts["meaning"]) if facts["audit"] else None
    for path in files.cards:
        path.write_text(templates.get_template(f"{path.name}.jinja").render(run=run, **facts), encoding="utf-8")
    if files.weights.is_dir():
        _as_model_card(files.model_card, files.cards[0].read_text(encoding="utf-8"))
    return files.cards


def environment() -> Environment:
    """Where the templates are, and how they write numbers: upper bounds are rounded up, lower bounds down."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["at_most"], made.filters["at_least"] = _known(rounded_up), _known(rounded_down)
    made.filters["percent_at_most"] = _known(percent_up)
    made.filters["percent"] = _known(lambda value: f"{100 * value:.3g} %")  # of what is exact, or bounds nothing
    made.filters["count"] = _known("{:,}".format)
    made.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())  # of a table in Markdown
    return made


def _known(write: Callable[..., str]) -> Callable[..., str]:
    """The filter ``write``, for facts that another version of dpft may not have recorded."""
    return lambda value, *digits: (
        "not known" if value is None or isinstance(value, Undefined) else write(value, *digits)
    )


def unit_words(unit: str) -> str:
    """Whom a guarantee protects."""
    return (
        "one example (a row of the training data)" if unit == "example" else f"all rows that share one value of {unit}"
    )


def _as_model_card(readme: Path, card: str) -> None:
    """Put the card where Hugging Face shows a model's card, below the metadata that PEFT left there."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    metadata = text[: text.index("---", 3) + 4] if text.startswith("---") else ""
    readme.write_text(f"{metadata}\n{card}" if metadata else card, encoding="utf-8")


def _facts(run: RunRecord) -> dict:
    facts = {
        "unit_words": unit_words(run.unit),
        "adjacency_words": ADJACENCY_WORDS[run.adjacency],
        "steps": [event for event in run.events if not event.name],
        "others": [event for event in run.events if event.name],
        "words": VERDICTS,
        "metrics": _rows(run.metrics),
        "classes": (run.metrics or {}).get("per_class", {}),
    }
    if not run.claims:
        return {**facts, "epsilon": None, "plots": [], "meaning": None}
    found = meaning(run.events, run.delta, run.adjacency)
    epsilon = found.epsilon
    facts["meaning"] = found
    rdp = accounting.epsilon_rdp(to_dp_event(run.events), run.delta, run.adjacency)
    facts["epsilon_rdp"] = rdp if math.isfinite(rdp) else None
    plots = [_over_steps(run, epsilon), _over_delta(run, epsilon), trade_off(found.curve)]
    facts["plots"] = [plot for plot in plots if plot]
    return {**facts, "epsilon": epsilon, "odds": math.exp(epsilon) if epsilon < LARGEST_EXPONENT else math.inf}


def _over_steps(run: RunRecord, epsilon: float) -> str | None:
    """ε after each step; None where no curve can be drawn."""
    if len(run.events) != 1 or not math.isfinite(epsilon):
        return None
    (spent,) = run.events
    count = spent.count * spent.steps
    steps = sorted({round(count * i / 24) for i in range(25)})
    return line(
        steps,
        [composition.epsilon((spent.spanning(n),), run.delta, run.adjacency) if n else 0.0 for n in steps],
        Labels("ε spent while training", "step", "ε"),
        mark=(count, epsilon, f"ε = {rounded_up(epsilon)}"),
    )


def _over_delta(run: RunRecord, epsilon: float) -> str | None:
    """δ at each ε; None where no curve can be drawn."""
    if not math.isfinite(epsilon):
        return None
    epsilons = [epsilon * i / 40 for i in range(0, 61)]
    deltas = accounting.deltas(to_dp_event(run.events), epsilons, run.adjacency)
    points = [(e, d) for e, d in zip(epsilons, deltas, strict=True) if d > 1e-12]
    if not points:
        return None
    return line(
        [epsilon for epsilon, _ in points],
        [delta for _, delta in points],
        Labels("The whole guarantee: every (ε, δ)", "ε", "δ"),
        mark=(epsilon, run.delta, f"δ = {rounded_up(run.delta, 6)}"),
        log_y=True,
    )


def _roc(audit: dict, allowed: Meaning | None) -> str:
    curves = {"found": audit["roc"]}
    if allowed is not None and audit["repetitions"] == 1:
        curves["at most, by the guarantee"] = allowed.curve
    return roc(curves, title="Which canaries were in the data?")


def _rows(metrics: dict | None) -> list[tuple[str, str]]:
    if not metrics:
        return []
    return [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    ]
