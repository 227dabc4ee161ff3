"""The privacy budget of a data set, over all runs, people and years: charged before it is spent, and tamper-evident."""

from dpft.ledger.dataset import Dataset, Run
from dpft.ledger.ledger import Ledger

__all__ = ["Dataset", "Ledger", "Run"]
