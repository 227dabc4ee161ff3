"""Where a run's files are: the only module that knows their names.

::

    DIR/recipe.toml       the recipe as resolved                        public
    DIR/run.json          guarantee, events, versions                   public: dpft.runs.record lists all of it
    DIR/releases.json     how many releases were charged                public
    DIR/sums.npy          what the run of a head has released           public
    DIR/ledger.json       which run of a ledger was charged for them    public
    DIR/weights/          the adapter or the model                      public: what the guarantee is for
    DIR/card.md, .html    the privacy card                              public
    DIR/audit.json        what an audit found                           public
    DIR/sweep.json        what a sweep found                            public: dpft.runs.sweep
    DIR/checkpoint-N/     to resume from                                public
    DIR/private/          un-noised metrics, times, techniques          PRIVATE: never publish
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.runs.record import RunRecord, read_json, write_whole

RELEASES = "releases.json"  # also in each checkpoint
ACCOUNT = "ledger.json"  # also in each checkpoint
STATE = "trainer_state.json"  # in a checkpoint, and the last file of it: the steps that its weights are after
NUMBERS = "released.json"  # in a checkpoint: what the next step needs of what was released, beside the weights
PRIVATE = "private"  # the folder that is never published
RECORD = "run.json"
AUDIT = "audit.json"
METRICS = "metrics.json"
SWEEP = "sweep.json"
NOTICE = "PRIVATE: computed from data without noise; the guarantee does not cover it."


class RunFolder:
    """The folder of one run, or of a sweep of several.

    Attributes:
        path: where it is; it need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.toml"
        self.record_file = self.path / RECORD
        self.releases_file = self.path / RELEASES
        self.account_file = self.path / ACCOUNT
        self.sums_file = self.path / "sums.npy"
        self.weights = self.path / "weights"
        self.model_card = self.weights / "README.md"
        self.cards = (self.path / "card.md", self.path / "card.html")
        self.audit_file = self.path / AUDIT
        self.command_log = self.path / "command.log"  # of an audited command
        self.sweep_file = self.path / SWEEP
        self.private = self.path / PRIVATE
        self.metrics_file = self.private / METRICS
        self.facts_file = self.private / RECORD  # times and techniques
        self.cell_file = self.private / "cell.json"  # of a sweep: written last, when all of the cell is there
        self.log_file = self.private / "log.txt"  # what libraries say in a cell's own process
        self.preflight_file = self.private / "preflight.json"
        self.canaries_file = self.private / "canaries.json"
        self.private_audit_file = self.private / AUDIT
        self.lock_file = self.private / "lock"

    def __str__(self) -> str:
        return str(self.path)

    # -- the record ----------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether a run ended here; what the interrupt key ends early counts as well."""
        return self.record_file.exists()

    def record(self) -> RunRecord:
        """What the run claims and released, whichever version of dpft wrote it.

        Raises:
            RecipeError: there is none, or it is no record of a run.
            PlanError: it names a release that this version does not know.
        """
        if not self.finished:
            raise RecipeError(
                f"{self} holds no finished run (no {RECORD}): give the folder that `dpft train --output` made."
            )
        return RunRecord.from_dict(read_json(self.record_file), self.record_file)

    def write_record(self, record: RunRecord) -> None:
        """Make ``run.json``."""
        write_whole(self.record_file, record.to_json())

    # -- the recipe ----------------------------------------------------------------------------------------------

    def recipe(self) -> Recipe:
        """The recipe that was run.

        Raises:
            RecipeError: it cannot be read.
        """
        return Recipe.read(self.recipe_file)

    def write_recipe(self, recipe: Recipe, *, comments: bool = False) -> None:
        """Make ``recipe.toml``."""
        write_whole(self.recipe_file, recipe.to_toml(comments=comments))

    def is_of(self, recipe: Recipe) -> bool:
        """Whether the folder's run is one of ``recipe``."""
        return self.recipe() == recipe

    # -- metrics and other private facts -------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any] | None:
        """The run's metrics, wherever they are kept; for the eyes of whoever may see the data.

        Raises:
            RecipeError: see :meth:`record`.
        """
        return read_json(self.metrics_file) if self.metrics_file.exists() else self.record().metrics

    def write_private(self, file: Path, facts: Mapping[str, Any], notice: str = NOTICE) -> None:
        """Write facts below ``private/``, with a notice that says so."""
        self.private.mkdir(exist_ok=True)
        write_whole(file, json.dumps({"notice": notice, **facts}, indent=2))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether a run that ended early left what it can go on from."""
        kept = self.last_checkpoint() is not None or self.sums_file.exists()
        return kept and self.releases_file.exists()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        whole = [path.parent for path in self.path.glob(f"checkpoint-*/{STATE}")]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def remove_checkpoints(self) -> None:
        """Leave the run with its weights alone."""
        for path in self.path.glob("checkpoint-*"):
            shutil.rmtree(path)

    # -- dates ---------------------------------------------------------------------------------------------------

    def round_dates(self) -> None:
        """Date every file, but for what is private, to the beginning of the day: seconds would follow the true batch
        sizes."""
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
        for path in _published(self.path):
            os.utime(path, (midnight, midnight))


def today() -> str:
    """The day, which may be published; the time may not."""
    return datetime.now(UTC).date().isoformat()


def step_of(checkpoint: Path | str) -> int:
    """At which step a checkpoint was made."""
    return int(json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"])


def _published(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir(), reverse=True):
        if path.name == PRIVATE or path.is_symlink():
            continue
        if path.is_dir():
            yield from _published(path)
        yield path
