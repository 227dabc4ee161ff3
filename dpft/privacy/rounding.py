"""Figures of a guarantee as text: rounded so that what is printed is still a bound."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


def rounded_up(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, never less than it is; infinity is ``inf``.

    >>> rounded_up(1.2149), rounded_up(0.0036, 1), rounded_up(3.0)
    ('1.22', '0.004', '3')
    """
    return _rounded(value, digits, ROUND_CEILING)


def rounded_down(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, never more than it is: for lower bounds.

    >>> rounded_down(1.2159), rounded_down(0.0036, 1), rounded_down(3.0)
    ('1.21', '0.003', '3')
    """
    return _rounded(value, digits, ROUND_FLOOR)


def percent_up(share: float, digits: int = 3) -> str:
    """``share`` in percent, never less than it is; the shift is decimal, so that 0.07 stays 7.

    >>> percent_up(0.07), percent_up(0.4301), percent_up(1.0)
    ('7 %', '43.1 %', '100 %')
    """
    return _rounded(share, digits, ROUND_CEILING, shift=2) + " %"


def _rounded(value: float, digits: int, rounding: str, shift: int = 0) -> str:
    if not math.isfinite(value):
        return str(float(value))
    bound = Decimal(repr(float(value))).scaleb(shift).normalize(Context(prec=digits, rounding=rounding))
    return f"{float(bound):.{digits}g}"
