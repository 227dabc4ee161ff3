"""What is learned: per-example losses, collation and metrics, one file per task."""

from dpft.tasks.causal_lm import CausalLM
from dpft.tasks.encoded import Encoded
from dpft.tasks.sequence_classification import SequenceClassification
from dpft.tasks.task import LabelledTask, Task

__all__ = ["CausalLM", "Encoded", "LabelledTask", "SequenceClassification", "Task"]
