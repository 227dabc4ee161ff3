"""Sums of several processes come together at one place, where noise is added once and one voice charges."""

import torch

from dpft.gradients.engine import Engine
from dpft.gradients.world import Alone
from dpft.privacy.noise import SeededRandomness
from dpft.subset import Subset


class Twice(Alone):
    """As two ranks with the same examples would."""

    size = 2

    def __init__(self):
        self.said = 0

    def sum_(self, total):
        return total.mul_(2)

    def first(self, action):
        self.said += 1
        return action()


def released(case, plan, world, noise):
    torch.manual_seed(0)
    made = case("bert")
    model = Subset("head").apply(made.model).eval()
    charged = []
    fields = dict(randomness=SeededRandomness(3), before_release=charged.append, world=world)
    with Engine(model, plan(noise_multiplier=noise), **fields) as engine:
        engine.accumulate(made.losses(made.examples))
        engine.release()
    assert charged == [1]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_sums_double_and_noise_does_not(case, plan):
    one, two = released(case, plan, Alone(), 0.0), released(case, plan, world := Twice(), 0.0)
    torch.testing.assert_close(two, 2 * one)
    assert world.said == 1
    noisy_one, noisy_two = released(case, plan, Alone(), 1.0), released(case, plan, Twice(), 1.0)
    torch.testing.assert_close(noisy_two - two, noisy_one - one)
