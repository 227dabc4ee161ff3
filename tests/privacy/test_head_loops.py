"""The sums of heads, and heads, against plain loops over units and rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpft.privacy.clipping import FlatClip
from dpft.privacy.mechanisms.head_centred import HeadCentred
from dpft.privacy.mechanisms.head_descent import HeadDescent
from dpft.privacy.mechanisms.least_squares import LeastSquares
from dpft.privacy.mechanisms.linear_head import Sums
from dpft.privacy.mechanisms.prototypes import Prototypes
from tests.support.heads import (
    CLASSES,
    NUMBER,
    UNITS,
    WIDTH,
    every_head,
    rows,
    silent,
    with_and_without,
)


def cut(vector, length):
    """A list of numbers, not longer than this; zero if it is not finite."""
    size = math.sqrt(sum(x * x for x in vector))
    return [x * min(1.0, length / size) if size else x for x in vector] if math.isfinite(size) else [0.0] * len(vector)


def loop(data, part):
    """The sum over units of the weighted ``part(features, output)`` of a unit's rows, numpy arrays."""
    total = 0.0
    for unit in data.members:
        mean = 0.0
        for row in unit:
            x = np.array(cut([float(v) / data.scale for v in data.features[row]], 1.0))
            if data.real:
                y = np.array(cut(data.labels[row].tolist(), 1.0))
            else:
                y = np.array([float(k == int(data.labels[row])) for k in range(CLASSES)])
            mean = mean + part(x, y) / max(len(unit), data.rows_per_unit)
        total = total + mean
    return total


def mass(data, counts):
    """What sums are divided by."""
    return NUMBER if data.rows_per_unit == 1 else min(NUMBER, max(1.0, counts.sum()))


def balanced(data, bias, prior):
    return bias - data.balance * (np.log(prior) - np.log(prior).mean())


def james_stein(vector, variance):
    return max(0.0, 1 - max(0, len(vector) - 2) * variance / max(1e-30, vector @ vector))


def centre(mechanism, total, steps, number):
    """m and r, from the released sum."""
    mean = total / number
    variance = (mechanism.noise_multiplier / math.sqrt(steps) / number) ** 2
    kept = james_stein(mean, variance)
    length = max(0.0, mean @ mean - WIDTH * variance)
    around = math.sqrt(max(0.01, 1 - length + kept * WIDTH * variance))
    return kept * mean, min(1.1 * around, 1 + kept * math.sqrt(mean @ mean))


def moment_at(data, middle, radius):
    def part(x, y):
        away = np.array(cut(x - middle, radius))
        return np.outer(away, away)

    return loop(data, part)


def naive_prototypes(mechanism, data):
    counts_of, mean_of, sums_of, _ = mechanism.sums()
    sigma = mechanism.noise_multiplier
    counts = loop(data, lambda x, y: y)
    mean = loop(data, lambda x, y: x)
    sums = [counts, mean]
    n = np.maximum(counts, max(1.0, 2 * sigma / math.sqrt(counts_of)))
    prior = n / n.sum()
    m, r = centre(mechanism, mean, mean_of, mass(data, counts))
    sums.append(loop(data, lambda x, y: np.outer(y, cut(x - m, r))))
    delta, variances, kept = [], [], []
    for k in range(CLASSES):
        one = sums[-1][k] / n[k]
        variances.append((sigma * r / math.sqrt(sums_of) / n[k]) ** 2 + max(0.01, 1 - m @ m) / WIDTH / n[k])
        kept.append(james_stein(one, variances[k]))
        delta.append(kept[k] * one)
    size = sum(prior[k] * delta[k] @ delta[k] for k in range(CLASSES))
    most = max(0.01, 1 - m @ m - size)

    def part(x, y):
        away = np.array(cut(x - m, r)) - sum(y[k] * delta[k] for k in range(CLASSES))
        return np.array([min(most, sum(prior[k] * (delta[k] @ away) ** 2 for k in range(CLASSES)) / size)])

    sums.append(loop(data, part))
    s2 = min(most, max(sums[-1][0] / mass(data, counts), most / WIDTH))
    weight = np.array([delta[k] / (s2 + kept[k] * variances[k]) for k in range(CLASSES)])
    bias = np.array([math.log(prior[k]) - weight[k] @ m - weight[k] @ delta[k] / 2 for k in range(CLASSES)])
    if not data.has_bias:
        weight = weight + np.outer(bias, m / (m @ m + most))
        bias = 0 * bias
    return sums, weight / data.scale, balanced(data, bias, prior)


def naive_least_squares(mechanism, data):
    outputs_of, mean_of, least_of, moment_of, _ = mechanism.sums()
    sigma = mechanism.noise_multiplier
    counts = outputs = loop(data, lambda x, y: y)
    mean = loop(data, lambda x, y: x)
    m, r = centre(mechanism, mean, mean_of, mass(data, counts)) if data.has_bias else (np.zeros(WIDTH), 1.0)
    average = outputs / mass(data, outputs) * data.has_bias
    moment = moment_at(data, m, r)
    least = np.linalg.eigvalsh(moment)[:1]
    cross = loop(data, lambda x, y: np.outer(y, cut(x - m, r)))
    rho, noise = 0.05, sigma * r**2 / math.sqrt(moment_of)
    under = max(0.0, least[0] - sigma * r**2 / math.sqrt(least_of) * math.sqrt(2 * math.log(1 / rho)))
    ridge = max(0.0, 0.25 * noise * math.sqrt(WIDTH * math.log(2 * WIDTH**2 / rho)) - under)
    theta = cross @ np.linalg.inv(moment + ridge * np.eye(WIDTH))
    prior = np.maximum(outputs, max(1.0, 2 * sigma / math.sqrt(outputs_of)))
    prior = prior / prior.sum()
    sharp = 1.0 if data.real else 2.3 * math.log(4 * CLASSES)
    sums = [outputs, mean, least, moment[np.triu_indices(WIDTH)], cross]
    return sums, sharp * theta / data.scale, balanced(data, sharp * (average - theta @ m), prior)


def naive_descent(mechanism, data):
    whitens = type(mechanism) is HeadDescent
    counts_of, mean_of, *moment_of = mechanism.statistics
    sigma, bound = mechanism.noise_multiplier, mechanism.clip.sensitivity
    counts = loop(data, lambda x, y: y)
    mean = loop(data, lambda x, y: x)
    number = mass(data, counts)
    prior = np.maximum(counts / number, max(1.0, 2 * sigma / math.sqrt(counts_of)) / number)
    prior = prior / prior.sum()
    m, r = centre(mechanism, mean, mean_of, number) if data.has_bias else (np.zeros(WIDTH), 1.0)
    sums, basis, constant = [counts, mean], np.eye(WIDTH) / r, 0.25
    if whitens:
        moment = moment_at(data, m, r)
        sums.append(moment[np.triu_indices(WIDTH)])
        found = torch.linalg.eigh(torch.as_tensor(moment / number))  # numpy's may have other signs
        spread, directions = found.eigenvalues.numpy(), found.eigenvectors.numpy()
        scarce = min(max((5 * WIDTH / number) ** 2, 5e-4), 0.1)
        ridge = max(scarce * spread.sum(), sigma * r**2 / math.sqrt(*moment_of) / number * math.sqrt(WIDTH))
        length = math.sqrt((spread / (spread + ridge)).sum())
        basis, constant = directions / np.sqrt(spread + ridge) / length, 1 / length
    width = WIDTH + data.has_bias
    weights, velocity, tail = np.zeros((CLASSES, width)), 0.0, []
    if data.has_bias:
        weights[:, -1] = (np.log(prior) - np.log(prior).mean()) / constant
    noise = sigma * math.sqrt(CLASSES * width) / number
    rate = 1.2 / constant**2 * min(1.0, 0.014 / noise) if whitens else min(24.0, 2 / noise**0.7)
    steps = mechanism.gradients
    for step in range(steps):

        def of_row(x, y, weights=weights):
            z = np.array([*cut((x - m) @ basis, 1.0), *([constant] if data.has_bias else [])])
            p = np.exp(weights @ z)
            return np.outer(p / p.sum() - y, z)

        total = 0.0
        for unit in data.members:
            alone = replace(data, features=data.features[unit], labels=data.labels[unit], members=[range(len(unit))])
            gradient = loop(alone, of_row)
            size = math.sqrt((gradient**2).sum())
            total = total + gradient * min(1.0, bound / size)
        sums.append(total)
        velocity = 0.9 * velocity + total / number
        weights = weights - rate * velocity
        if step >= min(steps - 1, 2 * steps / 3):
            tail.append(weights)
    weights = sum(tail) / len(tail)
    along = weights[:, :WIDTH] @ basis.T
    bias = weights[:, -1] * constant if data.has_bias else np.zeros(CLASSES)
    return sums, along / data.scale, balanced(data, bias - along @ m, prior)


NAIVE = {
    Prototypes: naive_prototypes,
    LeastSquares: naive_least_squares,
    HeadDescent: naive_descent,
    HeadCentred: naive_descent,
}


@every_head
@with_and_without
@pytest.mark.parametrize("units", [UNITS, [[i] for i in range(12)]], ids=["units of several rows", "rows"])
@pytest.mark.parametrize(("sigma", "clip"), [(1e-3, 4.0), (0.5, 0.5)])
@pytest.mark.parametrize("rows_per_unit", [1, 3])
def test_sums_and_head_are_those_of_plain_loops(mechanism, has_bias, units, sigma, clip, rows_per_unit):
    mechanism = replace(mechanism, noise_multiplier=sigma, clip=FlatClip(clip))
    balance = 0.5 if has_bias else 0.0
    data = rows(units=units, scale=0.75, has_bias=has_bias, rows_per_unit=rows_per_unit, balance=balance)
    head, sums = silent(mechanism, data)
    wanted, weight, bias = NAIVE[type(mechanism)](mechanism, data)
    assert [steps for _, steps in sums.how] == list(mechanism.sums()) and sum(mechanism.sums()) == mechanism.steps
    for found, by_hand in zip(sums.totals, wanted, strict=True):
        torch.testing.assert_close(found, torch.as_tensor(by_hand), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(head.weight, torch.as_tensor(weight), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.bias, torch.as_tensor(bias), rtol=1e-3, atol=1e-4)
    assert head.weight.dtype == head.bias.dtype == torch.float64 and (has_bias or not head.bias.any())


@with_and_without
def test_least_squares_learn_real_targets(has_bias):
    data = rows(real=True, has_bias=has_bias)
    mechanism = LeastSquares(noise_multiplier=1e-3, steps=20)
    head, sums = silent(mechanism, data)
    wanted, weight, bias = naive_least_squares(mechanism, data)
    for found, by_hand in zip(sums.totals, wanted, strict=True):
        torch.testing.assert_close(found, torch.as_tensor(by_hand), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(head.weight, torch.as_tensor(weight), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.bias, torch.as_tensor(bias), rtol=1e-3, atol=1e-5)


def test_noise_on_the_least_spread_never_makes_a_ridge_negative():
    """The more it says, the less ridge there is, down to none; and no less than nothing is said."""
    mechanism, data = LeastSquares(noise_multiplier=0.5, steps=20), rows()
    _, sums = silent(mechanism, data)
    heads = []
    for said in (-1e6, 0.0, 1e6):
        known = [torch.full_like(value, said) if place == 2 else value for place, value in enumerate(sums.values)]
        heads.append(mechanism.fit(data, Sums(0.5, None, known=known), NUMBER).weight)
    assert torch.equal(heads[0], heads[1])
    m, r = centre(mechanism, sums.values[1].numpy(), mechanism.sums()[1], NUMBER)
    plain = sums.values[4] @ torch.linalg.inv(torch.as_tensor(moment_at(data, m, r)))
    torch.testing.assert_close(heads[2], plain * 2.3 * math.log(4 * CLASSES), rtol=1e-4, atol=1e-5)
