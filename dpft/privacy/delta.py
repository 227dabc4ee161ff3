"""The largest δ that a claim may have."""

from dpft.errors import DPFTError, PlanError


def too_large(delta: float, units: int | None) -> bool:
    """Whether a guarantee at ``delta`` permits publishing one of ``units`` whole; never where no units are declared."""
    return units is not None and delta >= 1 / max(1, units)


def check_delta(
    delta: float, units: int | None, *, subject: str = "delta", error: type[DPFTError] = PlanError, way_out: str = ""
) -> None:
    """Raises ``error``: ``subject`` is too large for ``units``, a public number.

    Args:
        way_out: by default to choose a smaller one.
    """
    if units is not None and too_large(delta, units):
        choose = way_out or f"choose a delta below {1 / units:.1e}, better {0.1 / units:.1e}"
        raise error(
            f"{subject} is {delta:g} for {units:,} units, and a delta of 1/units or more permits publishing a random "
            f"unit whole: {choose}."
        )
