"""The engine against the brute-force loop, and every silent break it must refuse."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from dpft.errors import BudgetError, BypassError, GuaranteeError, SubsetError
from dpft.gradients.batch_gradients import BatchGradients
from dpft.gradients.engine import Engine
from dpft.gradients.preflight import preflight
from dpft.privacy import noise
from dpft.privacy.clipping import AutoClip, FlatClip
from dpft.privacy.noise import SecureRandomness, SeededRandomness
from dpft.subset import Subset
from dpft.tasks.losses import class_losses

C = 0.05  # small enough that every gradient of these models is clipped


@pytest.fixture
def bert(case):
    made = case("bert")
    made.model = Subset("lora(targets='all-linear') + head").apply(made.model)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    made.model.eval()
    return made


@pytest.fixture
def quiet(plan):
    """A plan without noise whose normaliser is 1."""
    return lambda **fields: plan(**{"noise_multiplier": 0.0, "sample_rate": 0.125, "clip": FlatClip(C), **fields})


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in trainable(model)])


def brute_force(made, groups, clip, mean):
    """Σ over units of the clipped gradient of that unit, by one plain backward pass for each example."""
    total = 0
    for group in groups:
        unit = 0
        for i in group:
            loss = made.losses([made.examples[i]])[0]
            gradients = torch.autograd.grad(loss, trainable(made.model))
            unit = unit + torch.cat([g.flatten() for g in gradients])
        unit = unit / len(group) if mean else unit
        total = total + unit * clip.factors(unit.norm())
    return total


@pytest.mark.parametrize("clip", [FlatClip(C), AutoClip(C)])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("groups", [[[0], [1], [2]], [[0, 1], [2]], [[0, 1, 2]]])
def test_the_clipped_sum_is_that_of_the_brute_force_loop(bert, quiet, clip, mean, groups):
    """T16: examples of a unit are one gradient before the norm is taken."""
    expected = brute_force(bert, groups, clip, mean)
    order = [i for group in groups for i in group]
    units = [f"patient {u}" for u, group in enumerate(groups) for _ in group]
    plan = quiet(clip=clip, unit="patient", examples_per_unit=3, unit_gradient="mean" if mean else "sum")
    with Engine(bert.model, plan) as engine:
        engine.accumulate(bert.losses([bert.examples[i] for i in order]), units)
        engine.release()
    torch.testing.assert_close(flat_gradient(bert.model), expected, rtol=1e-4, atol=1e-7)


def every_cut(n):
    for size in range(n):
        for places in itertools.combinations(range(1, n), size):
            yield [list(range(a, b)) for a, b in zip((0, *places), (*places, n), strict=True)]


@pytest.mark.parametrize(
    "subset", ["lora + head", "sparse(fraction=0.2)", "ia3", "prompt_tuning(num_virtual_tokens=2)"]
)
def test_units_are_whole_under_every_technique(subset, case, quiet):
    """T16: rules, functional differentiation and one example at a time; units spread over micro-batches."""
    made = case("bert")
    made.model = Subset(subset).apply(made.model).eval()
    made.examples = [made.examples[i] for i in (0, 1, 1, 2, 0)]
    units = ["a", "a", "b", "c", "c"]
    expected = brute_force(made, [[0, 1], [2], [3, 4]], FlatClip(C), True)
    with Engine(made.model, quiet(unit="patient", examples_per_unit=2, steps=16)) as engine:
        preflight(engine, made.losses, made.examples)
        for cut in every_cut(5) if engine.max_examples(9) > 1 else [[[i] for i in range(5)]]:
            for group in cut:
                engine.accumulate(made.losses([made.examples[i] for i in group]), [units[i] for i in group])
            engine.release()
            torch.testing.assert_close(flat_gradient(made.model), expected, rtol=1e-4, atol=1e-7)


def test_the_clipped_sum_is_the_same_for_every_cut(bert, quiet):
    """T7: micro-batches are speed and memory, nothing else; units may spread over them."""
    examples = [bert.examples[i] for i in (0, 1, 1, 2, 0)]
    units = ["a", "a", "b", "c", "c"]
    sums = []
    for cut in every_cut(5):
        with Engine(bert.model, quiet(unit="patient", examples_per_unit=2)) as engine:
            for group in cut:
                engine.accumulate(bert.losses([examples[i] for i in group]), [units[i] for i in group])
            engine.release()
        sums.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    assert len(sums) == 16
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-4, atol=1e-7)


def test_a_step_that_fails_in_its_middle_is_forgotten(bert, quiet, monkeypatch):
    """What was added before it failed would count twice when the step is tried again."""
    add_to = BatchGradients.add_to

    def fails(*arguments):
        add_to(*arguments)
        raise torch.OutOfMemoryError

    expected = brute_force(bert, [[0], [1], [2]], FlatClip(C), True)
    with Engine(bert.model, quiet()) as engine:
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(BatchGradients, "add_to", fails)
            engine.accumulate(bert.losses(bert.examples))
        engine.accumulate(bert.losses(bert.examples))
        engine.release()
    torch.testing.assert_close(flat_gradient(bert.model), expected, rtol=1e-4, atol=1e-7)


def test_losses_of_another_model_are_refused(bert, quiet):
    """T5, T19: what trains outside the engine's model would be stepped un-noised."""
    scale = nn.Parameter(torch.ones(()))
    with Engine(bert.model, quiet()) as engine:
        with pytest.raises(BypassError, match=r"a trainable parameter of shape \(\) that is not the engine's model's"):
            engine.accumulate(bert.losses(bert.examples) * scale)
        assert scale.grad is None
        engine.accumulate(bert.losses(bert.examples) * scale.detach())


def test_a_unit_that_comes_back_is_refused(bert, quiet):
    """T16."""
    with Engine(bert.model, quiet(unit="patient", examples_per_unit=2)) as engine:
        engine.accumulate(bert.losses(bert.examples[:2]), ["a", "b"])
        with pytest.raises(GuaranteeError, match="'a' came back"):
            engine.accumulate(bert.losses(bert.examples[:2]), ["a", "c"])


def test_a_unit_moves_the_sum_by_at_most_the_clip(bert, quiet):
    """The definition itself: with and without one unit, whatever else is in the batch."""
    sums = []
    for chosen in ([0, 1, 2], [0, 2]):
        with Engine(bert.model, quiet()) as engine:
            engine.accumulate(bert.losses([bert.examples[i] for i in chosen]))
            engine.release()
        sums.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    assert float((sums[0] - sums[1]).norm()) == pytest.approx(C, rel=1e-4)


def test_without_noise_and_clipping_it_is_plain_sgd(bert, quiet):
    with Engine(bert.model, quiet(clip=FlatClip(1e9))) as engine:
        engine.accumulate(bert.losses(bert.examples))
        engine.release()
    found = flat_gradient(bert.model)
    bert.model.zero_grad()
    bert.losses(bert.examples).sum().backward()
    torch.testing.assert_close(found, flat_gradient(bert.model), rtol=1e-4, atol=1e-7)


def test_tied_weights_accumulate_over_all_uses(case, quiet):
    """T4: GPT-2's head is its embedding."""
    made = case("gpt2")
    made.model = Subset("head").apply(made.model).eval()
    expected = brute_force(made, [[0], [1], [2]], FlatClip(C), True)
    with Engine(made.model, quiet()) as engine:
        engine.accumulate(made.losses(made.examples))
        engine.release()
    torch.testing.assert_close(flat_gradient(made.model), expected, rtol=1e-4, atol=1e-7)


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [FlatClip(0.3), AutoClip(2.0)])
@pytest.mark.parametrize("micro_batches", [0, 1, 3])
def test_each_step_gets_one_draw_of_the_stated_noise(bert, plan, clip, micro_batches):
    """T6, T7: σ·C / B for every parameter, however many micro-batches; σ·2/3 and σ·3/2 would fail."""
    made = plan(noise_multiplier=2.0, sample_rate=0.5, units=8, clip=clip)
    with Engine(bert.model, made, SeededRandomness(0)) as engine:
        for _ in range(micro_batches):
            engine.accumulate(bert.losses(bert.examples) * 0)
        engine.release()
    for part in (
        flat_gradient(bert.model),
        torch.cat(
            [
                p.grad.flatten()
                for n, p in bert.model.named_parameters()
                if "modules_to_save" in n and p.grad is not None
            ]
        ),
    ):
        scaled = part * 4.0 / clip.sensitivity
        deviation = lambda std, scaled=scaled: abs(float((scaled**2).mean()) / std**2 - 1) / (2 / len(scaled)) ** 0.5
        assert deviation(2.0) < 5
        assert deviation(2.0 * 2 / 3) > 5 and deviation(2.0 * 3 / 2) > 5


def test_a_draw_made_in_many_parts_covers_every_parameter(bert, plan, monkeypatch):
    """Long draws are made and added part by part: no part may be missed, nor any noise be used twice."""
    monkeypatch.setattr(noise, "_CHUNK", 100)
    with Engine(bert.model, plan(), SeededRandomness(5)) as engine:
        engine.release()
        size, trainables = engine.capture.map.size, engine.capture.map.trainables
    released = torch.zeros(size)
    for trainable in trainables:
        trainable.view(released).copy_(trainable.parameter.grad)
    assert size > 300
    expected = SeededRandomness(5).gaussian(size) * plan().noise_std / plan().expected_batch_size
    torch.testing.assert_close(released, expected.float())
    assert len(expected.unique()) == size


def test_an_empty_draw_releases_noise(bert, plan):
    """T9."""
    with Engine(bert.model, plan()) as engine:
        engine.release()
        assert engine.steps_released == 1
    assert all((p.grad != 0).any() for p in trainable(bert.model))


def test_a_step_changes_the_whole_subset_and_nothing_else(bert, plan):
    """T5: everything trainable receives noise, the rest stays bit-identical."""
    before = {name: value.clone() for name, value in bert.model.state_dict().items()}
    optimizer = torch.optim.SGD(bert.model.parameters(), lr=1.0)
    with Engine(bert.model, plan()) as engine:
        engine.release()
        optimizer.step()
    names = {name for name, p in bert.model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in names) and any("lora_A" in name for name in names)
    for name, value in bert.model.state_dict().items():
        changed = (value != before[name]).float().mean()
        assert changed > 0.99 if name in names else changed == 0, name


def test_a_record_that_is_not_drawn_changes_nothing(bert, plan):
    """T8: with the noise held fixed, only the public batch size divides."""
    released = []
    for rows in (bert.examples, bert.examples + [bert.examples[0]]):
        with Engine(bert.model, plan(), SeededRandomness(5)) as engine:
            engine.accumulate(bert.losses(rows[:2]))
            engine.release()
        released.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    assert torch.equal(*released)


def test_the_normaliser_is_the_public_batch_size(bert, quiet):
    """T8: B = q·N₀, whatever was drawn."""
    sums = []
    for rate in (0.125, 0.5):
        with Engine(bert.model, quiet(sample_rate=rate)) as engine:
            engine.accumulate(bert.losses(bert.examples))
            engine.release()
        sums.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    torch.testing.assert_close(sums[0], sums[1] * 4)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_unit_contributes_nothing(bert, quiet, poison):
    """T12: 0 · inf is NaN, which would poison the sum and reveal the unit."""
    sums = []
    for chosen, weights in (([0, 2], [1, 1]), ([0, 1, 2], [1, poison, 1])):
        with Engine(bert.model, quiet()) as engine:
            engine.accumulate(bert.losses([bert.examples[i] for i in chosen]) * torch.tensor(weights))
            engine.release()
        sums.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    assert engine.nonfinite_units == 1
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-7)


def test_examples_that_go_one_by_one_share_no_forward_pass(bert, quiet):
    """T12: in the backward pass of one, 0 · inf of its neighbour is NaN, so that one record would silence others."""
    sums = []
    for weights in ([1.0], [1.0, float("inf")]):
        with Engine(bert.model, quiet()) as engine:
            engine.capture.go_one_by_one("a test")
            with pytest.raises(GuaranteeError, match="2 losses of one forward pass .* one example at a time"):
                engine.accumulate(bert.losses(bert.examples[:2]))
            assert engine.max_examples(9) == 1
            for example, weight in zip(bert.examples, weights, strict=False):
                engine.accumulate(bert.losses([example]) * weight)
            engine.release()
        sums.append(flat_gradient(bert.model))
        bert.model.zero_grad()
    assert engine.nonfinite_units == 1 and sums[0].any()
    torch.testing.assert_close(*sums)


@pytest.mark.parametrize("shape", ["mean", "matrix"])
def test_losses_must_be_per_example(bert, plan, shape):
    """T1."""
    losses = bert.losses(bert.examples)
    with Engine(bert.model, plan()) as engine, pytest.raises(GuaranteeError, match="loss of its own"):
        engine.accumulate(losses.mean() if shape == "mean" else losses.unsqueeze(1))


def test_a_backward_pass_past_the_engine_is_refused(bert, plan):
    """T19."""
    with Engine(bert.model, plan()), pytest.raises(BypassError, match="outside engine.accumulate"):
        bert.losses(bert.examples).sum().backward()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_steps_only_on_released_gradients(bert, plan, optimizer_class):
    """T19: a gradient from elsewhere, a changed one, a second step, a second optimizer."""
    optimizer = optimizer_class(trainable(bert.model), lr=0.1)
    parameter = trainable(bert.model)[0]
    with Engine(bert.model, plan()) as engine:
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(BypassError, match="did not release"):
            optimizer.step()
        parameter.grad = None
        engine.release()
        parameter.grad.add_(1.0)
        with pytest.raises(BypassError, match="was changed after engine.release"):
            optimizer.step()
        engine.release()
        optimizer.step()
        with pytest.raises(BypassError, match="did not release"):
            torch.optim.SGD(trainable(bert.model), lr=0.1).step()
    optimizer.step()  # detached: the model is the user's again


def test_a_stray_gradient_before_accumulate_is_refused(bert, plan):
    """T19."""
    parameter = trainable(bert.model)[0]
    with Engine(bert.model, plan()) as engine:
        parameter.grad = torch.ones_like(parameter)
        with pytest.raises(BypassError, match="did not make"):
            engine.accumulate(bert.losses(bert.examples))


def test_an_optimizer_on_frozen_layers_is_refused(bert, plan):
    """T5: a second optimizer with gradients outside the subset."""
    frozen = next(p for p in bert.model.parameters() if not p.requires_grad)
    frozen.grad = torch.ones_like(frozen)
    with Engine(bert.model, plan()), pytest.raises(BypassError):
        torch.optim.SGD([frozen], lr=0.1).step()


def test_a_parameter_unfrozen_later_is_refused(bert, plan):
    """T5."""
    with Engine(bert.model, plan()) as engine:
        next(p for p in bert.model.parameters() if not p.requires_grad).requires_grad_(True)
        with pytest.raises(GuaranteeError, match="became trainable"):
            engine.accumulate(bert.losses(bert.examples))


def test_no_release_beyond_the_plan(bert, plan):
    """T9: planned steps are all there are."""
    with Engine(bert.model, plan(steps=2)) as engine:
        engine.release()
        engine.release()
        with pytest.raises(BudgetError, match="All 2 planned steps"):
            engine.release()


def test_nothing_is_released_that_was_not_charged(bert, plan):
    """T15: the charge comes first; if it fails there is no gradient."""

    def refuse(number):
        assert all(p.grad is None for p in bert.model.parameters())
        raise BudgetError("spent")

    with Engine(bert.model, plan(), before_release=refuse) as engine:
        engine.accumulate(bert.losses(bert.examples))
        with pytest.raises(BudgetError):
            engine.release()
    assert engine.steps_released == 0 and all(p.grad is None for p in bert.model.parameters())


def test_nothing_trainable_is_refused(case, plan):
    with pytest.raises(SubsetError, match="select a subset"):
        Engine(case("bert").model.requires_grad_(False), plan())


def test_an_engine_that_is_not_attached_is_refused(bert, plan):
    with pytest.raises(GuaranteeError, match="not attached"):
        Engine(bert.model, plan()).accumulate(bert.losses(bert.examples))


# -- the model stays what it was ---------------------------------------------------------------------------------------


def test_detaching_leaves_nothing_behind(bert, plan):
    before = {name: set(vars(module)) for name, module in bert.model.named_modules()}
    state = {name: value.clone() for name, value in bert.model.state_dict().items()}
    with Engine(bert.model, plan()) as engine:
        assert list(state) == list(bert.model.state_dict())
        engine.accumulate(bert.losses(bert.examples))
    for name, module in bert.model.named_modules():
        assert set(vars(module)) == before[name]
    bert.losses(bert.examples).sum().backward()
    assert all(p.grad is not None for p in trainable(bert.model))
    assert not _global_optimizer_pre_hooks


def test_a_forward_that_others_replaced_is_used_and_restored(case, quiet):
    """Accelerate and offloading put a forward of their own on a layer."""
    made = case("bert")
    made.model = Subset("layers('classifier.*')").apply(made.model).eval()
    layer = made.model.classifier
    own = layer.forward
    layer.forward = lambda x: own(2 * x) / 2
    replaced = layer.forward
    with Engine(made.model, quiet()) as engine:
        engine.accumulate(made.losses(made.examples))
    assert layer.forward is replaced


def test_generation_and_evaluation_work_while_attached(case, plan):
    made = case("llama")
    made.model = Subset("lora").apply(made.model).eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = made.model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with Engine(made.model, plan()):
        with torch.no_grad():
            assert made.model(input_ids=prompt).logits.shape == (1, 3, 60)
        after = made.model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)


def test_a_seeded_source_is_never_called_private(bert, plan):
    """T10."""
    with Engine(bert.model, plan(), SeededRandomness(0)) as engine:
        engine.release()
    assert engine.guarantee.startswith("NOT PRIVATE")
    bert.model.zero_grad()
    with Engine(bert.model, plan()) as engine:
        preflight(engine, bert.losses, bert.examples)
        engine.release()
    assert isinstance(engine.randomness, SecureRandomness)
    assert engine.guarantee.startswith("(ε = ")


def test_reused_layer_accumulates(quiet):
    """T4: one layer called twice in a forward pass."""
    torch.manual_seed(0)
    layer, head = nn.Linear(4, 4), nn.Linear(4, 3)
    model = nn.ModuleList([layer, head])
    x = torch.randn(3, 4)
    losses = lambda x: class_losses(head(torch.tanh(layer(torch.tanh(layer(x))))), torch.arange(len(x)) % 3)
    with Engine(model, quiet(clip=FlatClip(1e9))) as engine:
        engine.accumulate(losses(x))
        engine.release()
    found = flat_gradient(model)
    model.zero_grad()
    losses(x).sum().backward()
    torch.testing.assert_close(found, flat_gradient(model), rtol=1e-4, atol=1e-7)


def test_a_model_made_under_inference_mode_is_refused(case, quiet):
    with torch.inference_mode():
        model = case("bert").model
    with pytest.raises(SubsetError, match="inference_mode"):
        Engine(model, quiet())
