"""``dpft train`` for a head that is learned by itself: what :mod:`dpft.workflows.train` asks of a trainer."""

from functools import partial
from typing import TYPE_CHECKING, Any

from dpft.training.checks import check_evaluation
from dpft.training.head import HeadSession

if TYPE_CHECKING:
    from dpft.workflows.setup import Setup


class HeadTrainer:
    """Learns the head of a recipe, and keeps its features in the setup, for a comparison's other runs.

    Attributes:
        session: counts, charges and releases.
    """

    def __init__(self, setup: "Setup", session: HeadSession) -> None:
        self._setup, self.session = setup, session

    def train(self, *, go_on: bool) -> None:
        """See :meth:`HeadSession.solve`; the evaluation's first rows are tried before anything is charged."""
        rows = self._setup.validation
        checks = [] if rows is None else [partial(check_evaluation, self.session.evaluate, rows)]
        self.session.solve(go_on=go_on, checks=checks)
        self._setup.features = self.session.features

    def evaluate(self) -> dict[str, Any]:
        """The task's metrics on the validation data, un-noised."""
        return {f"eval_{name}": value for name, value in self.session.evaluate(self._setup.validation).items()}
