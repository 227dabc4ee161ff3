"""Printed bounds are bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpft.privacy.rounding import percent_up, rounded_down, rounded_up


@given(st.floats(1e-9, 1e9), st.integers(1, 6))
def test_what_is_printed_is_never_on_the_wrong_side_and_never_far(value, digits):
    up, down = float(rounded_up(value, digits)), float(rounded_down(value, digits))
    assert down <= value <= up and up - down <= 1.01 * 10 ** (math.floor(math.log10(value)) + 1 - digits)


@given(st.floats(1e-300, 1))
def test_a_share_in_percent_is_never_less(share):
    assert Fraction(percent_up(share).removesuffix(" %")) >= 100 * Fraction(repr(share))


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (rounded_up, 1.2149, "1.22"),
        (rounded_up, 3.0, "3"),
        (rounded_up, 0.0036, "0.0036"),
        (rounded_up, np.float64(2.7731), "2.78"),
        (rounded_up, 0.0, "0"),
        (rounded_up, math.inf, "inf"),
        (rounded_down, 1.2159, "1.21"),
        (rounded_down, 0.0, "0"),
        (percent_up, 0.07, "7 %"),  # 100 times it is 7.000000000000001 in a float
        (percent_up, 0.43091, "43.1 %"),
        (percent_up, 0.43101, "43.2 %"),
    ],
)
def test_known_figures(write, value, text):
    assert write(value) == text
