"""What a private trainer shows: metrics to their caller, and to logs and callbacks only what is public."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from dpft.errors import RecipeError
from dpft.subset.evaluating import evaluating
from dpft.training.batches import Examples
from dpft.training.session import Session

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin
    from transformers import TrainerControl
    from transformers.trainer_utils import PredictionOutput
else:
    TrainerMixin = object  # which trainer it is mixed into, the user says

PUBLIC_LOGS = ("epoch", "step", "learning_rate", "epsilon")  # and figures on evaluation data that are declared public


class Evaluation(TrainerMixin):
    """The half of :class:`dpft.DPTrainerMixin` that judges and shows.

    With a task, metrics are the task's. Without one they are the trainer's own: its loss, ``compute_metrics``,
    generation.
    """

    session: Session
    has_task: bool
    evaluation_is_public: bool
    control: "TrainerControl"
    _unheard = False

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **generation: Any,
    ) -> dict[str, Any]:
        """Metrics on ``eval_dataset``, or on each of several by name, un-noised: logged only if
        ``evaluation_is_public``."""
        rows = self._named(self.eval_dataset if eval_dataset is None else eval_dataset)
        if rows is None:
            raise RecipeError("There is no eval_dataset to evaluate on: pass one.")
        if isinstance(rows, Mapping):
            prefix = metric_key_prefix
            parts = [self.evaluate(p, ignore_keys, f"{prefix}_{name}", **generation) for name, p in rows.items()]
            return {name: value for found in parts for name, value in found.items()}
        metrics = self.measured(rows, ignore_keys, metric_key_prefix, **generation)
        if self.evaluation_is_public:
            self.log({name: value for name, value in metrics.items() if isinstance(value, (int, float))})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(
        self, rows: Any, ignore_keys: list[str] | None = None, prefix: str = "eval", **generation: Any
    ) -> dict[str, Any]:
        """The metrics on one data set; nothing is logged."""
        if self.has_task:
            return {f"{prefix}_{name}": value for name, value in self.session.evaluate(rows).items()}
        with self._silence(), evaluating(self.model):
            return super().evaluate(rows, ignore_keys, prefix, **generation)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> "PredictionOutput":
        """See :meth:`transformers.Trainer.predict`; what it returns follows the rows, and nothing else sees it."""
        with self._silence(), evaluating(self.model):
            return super().predict(test_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return self._loader(eval_dataset) or super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        return self._loader(test_dataset) or super().get_test_dataloader(test_dataset)

    def _loader(self, rows: Any) -> DataLoader[Any] | None:
        """Rows as the trainer's task encodes them; None if it has none."""
        if not self.has_task or rows is None:
            return None
        task = self.session.task
        features: Any = Examples.encode(self._named(rows), task).features  # any sequence serves as a data set
        return DataLoader(features, batch_size=self.args.eval_batch_size, collate_fn=task.collate)

    def _named(self, rows: Any) -> Any:
        return self.eval_dataset[rows] if isinstance(rows, str) else rows

    @contextmanager
    def _silence(self) -> Iterator[None]:
        """Neither logs nor callbacks hear of what another library evaluates."""
        handler, self._unheard = self.callback_handler, True
        handler.on_evaluate = handler.on_predict = lambda args, state, control, *_: control
        try:
            yield
        finally:
            self._unheard = False
            del handler.on_evaluate, handler.on_predict
            getattr(self, "_metrics", {}).get("eval", {}).clear()  # what SFTTrainer keeps for its next log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log ε spent instead of the training loss; times and memory, too, would follow the true batch sizes."""
        if not self._unheard:
            super().log(self.shown(logs), *args, **kwargs)

    def shown(self, logs: dict[str, float]) -> dict[str, float]:
        """What of the logs is computed from the plan, from released weights, or from data declared public."""
        public = (*PUBLIC_LOGS, *(name for name in logs if name.startswith("eval_") and self.evaluation_is_public))
        logs = {name: value for name, value in logs.items() if name in public}
        spent = self.session.spent
        if spent is not None:
            logs["epsilon"] = spent
        return logs
