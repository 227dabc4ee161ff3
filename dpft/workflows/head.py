"""``dpft train`` for a head that is learned by itself: what :mod:`dpft.workflows.train` asks of a trainer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpft.privacy.noise import Randomness
from dpft.privacy.plan import Plan
from dpft.training.checks import check_evaluation
from dpft.training.head import HeadSession

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from dpft.workflows.setup import Setup


class HeadTrainer:
    """Learns the head of a recipe.

    Attributes:
        session: counts, charges and releases.
    """

    def __init__(
        self,
        setup: "Setup",
        output: Path,
        plan: Plan,
        *,
        randomness: Randomness | None = None,
        callbacks: "Sequence[TrainerCallback]" = (),
    ) -> None:
        from dpft.workflows.setup import open_account

        self._setup, self._callbacks = setup, callbacks
        self.session = HeadSession(
            setup.model,
            plan,
            setup.task,
            setup.train,
            output,
            features=setup.features,
            randomness=randomness,
            ledger=open_account(setup.recipe),
            purpose=setup.recipe.ledger.purpose,
            account_rows=setup.account_rows,
            tell=self._tell,
        )

    def _tell(self, name: str, *facts: Any) -> None:
        for callback in self._callbacks:
            if hasattr(callback, name):
                getattr(callback, name)(*facts)

    def train(self, *, go_on: bool) -> None:
        """See :meth:`HeadSession.solve`; the evaluation's first rows are tried before anything is charged."""
        rows = self._setup.validation
        checks = [] if rows is None else [partial(check_evaluation, self.session.evaluate, rows)]
        self.session.solve(go_on=go_on, checks=checks)
        self._setup.features = self.session.features  # for a comparison's other runs

    def evaluate(self) -> dict[str, Any]:
        """The task's metrics on the validation data, un-noised."""
        return {f"eval_{name}": value for name, value in self.session.evaluate(self._setup.validation).items()}
