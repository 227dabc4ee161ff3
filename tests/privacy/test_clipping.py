"""One contract for every clipping rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpft.errors import PlanError
from dpft.privacy.clipping import AutoClip, FlatClip, PerLayerClip, from_dict, to_dict

SIZES = {"a.weight": 6, "a.bias": 2, "b.0.weight": 24, "c": 1}
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


@pytest.mark.parametrize("shares", ["equal", "size"])
@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 3.0])
@given(norms=st.lists(st.lists(st.floats(0, 2.0**60, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_no_unit_exceeds_the_sensitivity_by_all_of_its_layers(shares, clip_norm, norms):
    rule = PerLayerClip(clip_norm, shares).over(SIZES)
    norms = torch.tensor(norms)
    clipped = norms.double() * rule.factors(norms).double()
    assert torch.isfinite(clipped).all()
    assert (clipped.norm(dim=1) <= clip_norm * (1 + 1e-6)).all()
    assert rule.sensitivity == pytest.approx(clip_norm, rel=1e-12)


def test_a_layer_is_a_module_and_its_share_is_equal_or_follows_its_size():
    equal, size = PerLayerClip(2.0).over(SIZES), PerLayerClip(2.0, "size").over(SIZES)
    assert equal.groups == size.groups == (0, 0, 1, 2)
    assert equal.bounds == pytest.approx([2 / 3**0.5] * 3)
    assert size.bounds == pytest.approx([2 * (n / 33) ** 0.5 for n in (8, 24, 1)])
    factors = equal.factors(torch.tensor([[0.0, 1.0, 2 / 3**0.5 * 4]]))
    assert factors.tolist()[0] == pytest.approx([1.0, 1.0, 0.25])
    with pytest.raises(PlanError, match="shares is 'even'"):
        PerLayerClip(1.0, "even")


@pytest.mark.parametrize("rule", [*RULES, PerLayerClip(0.5, "size")])
def test_a_rule_is_written_and_read_again(rule):
    assert from_dict(to_dict(rule)) == rule and PerLayerClip(0.5).sensitivity == 0.5
    with pytest.raises(PlanError, match="no clipping rule 'Clip'"):
        from_dict({"rule": "Clip"})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_bound_must_be_positive(value):
    with pytest.raises(PlanError, match="clip_norm"):
        FlatClip(value)
    with pytest.raises(PlanError, match="clip_norm"):
        AutoClip(value)
    with pytest.raises(PlanError, match="clip_norm"):
        PerLayerClip(value)
