"""Figures of a guarantee as text: rounded so that what is printed is still a bound."""

import math
from decimal import ROUND_CEILING, Context, Decimal


def rounded_up(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` significant digits, never less than it is; infinity is ``inf``.

    >>> rounded_up(1.2149), rounded_up(0.0036, 1), rounded_up(3.0)
    ('1.22', '0.004', '3')
    """
    if not math.isfinite(value):
        return str(value)
    bound = Decimal(repr(value)).normalize(Context(prec=digits, rounding=ROUND_CEILING))
    return f"{float(bound):.{digits}g}"
