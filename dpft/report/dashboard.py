"""The ledger as one page that needs no server: budgets, ε over time by run, and what the next run would cost."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from dpft.report.card import ADJACENCY_WORDS, environment
from dpft.report.plots import staircase


def write_dashboard(path: Path | str, ledger: str, public_key: str, accounts: Sequence[dict]) -> Path:
    """Write the page.

    Args:
        accounts: for each data set ``name``, ``policy``, ``spent``, ``runs`` (see :meth:`dpft.Dataset.curve`) and
            ``planned`` (see :meth:`dpft.Dataset.prices`).
    """
    shown = []
    for account in accounts:
        budget, spent, runs = account["policy"]["epsilon"], account["spent"], account["runs"]
        plot = None
        if runs and all(math.isfinite(run["epsilon"]) for run in runs):
            times = [datetime.fromisoformat(run["at"]) for run in runs]
            title = f"ε of {account['name']} over time"
            plot = staircase(times, [run["epsilon"] for run in runs], limit=budget, title=title, y_label="ε spent")
        before = 0.0
        for run in runs:
            run["added"], before = run["epsilon"] - before, run["epsilon"]
        shown.append(
            {
                **account,
                "plot": plot,
                "share": min(1.0, spent / budget),
                "adjacency": ADJACENCY_WORDS[account["policy"]["adjacency"]],
            }
        )
    made = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")[:16]
    page = environment().get_template("ledger.html.jinja")
    Path(path).write_text(
        page.render(accounts=shown, ledger=ledger, public_key=public_key, made=made), encoding="utf-8"
    )
    return Path(path)
