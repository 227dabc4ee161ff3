"""Attacks on what a run releases, by somebody who has its recipe, its seed and both data sets."""
