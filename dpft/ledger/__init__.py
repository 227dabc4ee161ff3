"""The privacy budget of a data set, over all runs, people and years: charged before it is spent, and tamper-evident."""

from dpft.ledger.dataset import About, Dataset, Run
from dpft.ledger.ledger import Ledger

__all__ = ["About", "Dataset", "Ledger", "Run"]
