"""Mechanisms: what may be released and what it costs, one file each. :mod:`.mechanism` is the contract and finds the
files."""

from dpft.privacy.mechanisms.mechanism import Mechanism, Words, made, mechanisms

__all__ = ["Mechanism", "Words", "made", "mechanisms"]
