"""Every PEFT tuner and layer, and combinations that nobody listed: exact, or refused for a reason of mathematics."""

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpft.errors import DPFTError, IsolationError
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy.clipping import FlatClip
from dpft.subset import Subset
from tests.support.zoo import FAMILIES, LAYERS, REFUSED, TUNERS, Case


def test_every_peft_type_is_tried():
    assert {tuner.peft_type for tuner in TUNERS.values()} == {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize(
    ("tuner", "family"), [(name, family) for name, tuner in TUNERS.items() for family in tuner.families]
)
def test_every_tuner_is_exact_or_refused(tuner, family, plan):
    made = Case(family, tuner)
    for module in made.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with Engine(made.model, plan()) as engine:
        if tuner in REFUSED:
            with pytest.raises(IsolationError, match="mixes the examples|un-noised"):
                preflight(engine, made.losses, made.examples)
            return
        found = preflight(engine, made.losses, made.examples)
        assert found.exact and found.max_relative_error < 5e-5
        batches = [made.examples] if engine.max_examples(9) >= 3 else [[example] for example in made.examples]
        for batch in batches:
            engine.accumulate(made.losses(batch))
        engine.release()
        assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_exact_or_refused(layer, plan):
    model, losses, examples = LAYERS[layer]()
    with Engine(model, plan()) as engine:
        if layer in REFUSED:
            with pytest.raises(IsolationError, match="GroupNorm"):
                preflight(engine, losses, examples)
        else:
            assert preflight(engine, losses, examples).max_relative_error < 5e-5


PARTS = [
    "lora(rank=2)", "lora(rank=2, targets='all-linear', dora=True)", "lora(rank=2, last_blocks=1, rslora=True)",
    "ia3", "vera(r=4)", "loha(r=2)", "hra(r=2)", "ln_tuning", "prompt_tuning(num_virtual_tokens=2)",
    "fourierft(n_frequency=9)",
    "vblora(r=2, num_vectors=8, vector_length=8)", "adalora(init_r=3, target_r=2, total_step=9)",
    "head", "bias", "norms", "last_blocks(1)", "layers('*1*')", "layers('*embed*')", "layers('*attn*')", "all",
    "sparse(fraction=0.01)", "sparse(fraction=0.3, choose='random')", "sparse(number=2, group='rows')",
    "sparse(number=40, over='model', layers='*')",
]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique=True),
)
def test_any_combination_is_exact_or_refused(family, parts, plan):
    """What passes the preflight is then compared, on other lengths and another batch, with one example at a time."""
    made = Case(family)
    try:
        made.model = Subset(" + ".join(parts)).apply(made.model)
        engine = Engine(made.model, plan(clip=FlatClip(1e9), noise_multiplier=0.0))
        with engine:
            preflight(engine, made.losses, made.examples)
    except DPFTError:
        return
    made.model.eval()
    others = [*made.examples[1:], made.examples[1], made.examples[0]]
    parameters = [p for p in made.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(made.losses([one])[0] for one in others), parameters, allow_unused=True)
    with engine:
        for batch in [others] if engine.max_examples(9) > 1 else [[one] for one in others]:
            engine.accumulate(made.losses(batch))
        engine.release()
    scale = engine.plan.expected_batch_size
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected = torch.zeros_like(parameter) if gradient is None else gradient / scale
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
