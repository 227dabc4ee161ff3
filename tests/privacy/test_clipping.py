"""One contract for every clipping rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpft.errors import PlanError
from dpft.privacy.clipping import AutoClip, FlatClip

RULES = [FlatClip(1.0), FlatClip(0.01), AutoClip(1.0), AutoClip(3.0, gamma=0.5)]


@pytest.mark.parametrize("rule", RULES)
@given(norms=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=20))
def test_no_unit_exceeds_the_sensitivity(rule, norms):
    norms = torch.tensor(norms)
    clipped = norms.double() * rule.factors(norms).double()
    assert torch.isfinite(clipped).all()
    assert (clipped <= rule.sensitivity * (1 + 1e-6)).all()


def test_flat_leaves_short_gradients_alone():
    assert FlatClip(2.0).factors(torch.tensor([0.0, 1.0, 2.0, 4.0])).tolist() == [1.0, 1.0, 1.0, 0.5]


def test_automatic_normalises_every_gradient():
    norms = torch.tensor([0.1, 10.0])
    assert torch.allclose(norms * AutoClip(1.0).factors(norms), norms / (norms + 0.01))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_bound_must_be_positive(value):
    with pytest.raises(PlanError, match="clip_norm"):
        FlatClip(value)
    with pytest.raises(PlanError, match="clip_norm"):
        AutoClip(value)
