"""What people read: the privacy card and its plots. Reads a run's folder alone and never imports torch."""

from dpft.report.card import write_card

__all__ = ["write_card"]
