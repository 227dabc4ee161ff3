"""What a guarantee lets anyone do at best, against the formulas of a single Gaussian mechanism."""

import pytest
from scipy.special import ndtr, ndtri

from dpft.errors import RecipeError
from dpft.privacy.events import Event
from dpft.recipe import Recipe
from dpft.report.meaning import CHOICES, describe, meaning, of_recipe, of_run
from dpft.report.plots import roc, trade_off
from dpft.training.run import train


@pytest.mark.parametrize(("adjacency", "apart"), [("add-or-remove-one", 1), ("replace-one", 2)])
def test_one_gaussian_release_lets_an_attacker_do_what_its_trade_off_says(adjacency, apart):
    sigma = 2.0  # over what a unit moves: 2 C where it is replaced
    found = meaning([Event(1, sigma * apart, 1.0)], 1e-5, adjacency)
    power = lambda alpha: ndtr(ndtri(alpha) + 1 / sigma)  # Dong et al. 2022
    for rate, most in found.detection.items():
        assert most == pytest.approx(power(rate), rel=0.02) and most >= power(rate) - 1e-9
    assert found.advantage == pytest.approx(2 * ndtr(0.5 / sigma) - 1, rel=0.01)
    for choices, most in found.reconstruction.items():
        assert most >= power(1 / choices) - 1e-9 and most == pytest.approx(power(1 / choices), rel=0.02)
    assert all(y >= x - 1e-9 for x, y in found.curve) and found.curve[-1][1] == pytest.approx(1.0)


def test_weak_protection_means_much_and_strong_little():
    weak, strong = (meaning([Event(100, s, 0.1)], 1e-5) for s in (0.5, 20.0))
    assert weak.advantage > 0.8 > 0.1 > strong.advantage > 0
    assert all(strong.reconstruction[n] < 2 / n for n in CHOICES if n > 2)


def test_runs_and_recipes_are_explained_in_words(recipe, tmp_path):
    chosen = Recipe.parse(recipe)
    before = of_recipe(chosen)
    after = of_run(train(chosen, tmp_path / "run"))
    assert after.epsilon == pytest.approx(before.epsilon, rel=1e-3) and after.advantage == pytest.approx(
        before.advantage
    )
    text = describe(after)
    assert "false alarms in 0.1 %" in text and "1,000,000 equally likely values" in text and "advantage" in text
    card = (tmp_path / "run" / "card.md").read_text()
    assert "by guessing" in card and "advantage" in card
    with pytest.raises(RecipeError, match="no finished run"):
        of_run(tmp_path)


def test_the_curves_are_drawn():
    svg = roc({"found": [(0.0, 0.0), (0.01, 0.3), (1.0, 1.0)], "none": [(0.0, 0.0), (1.0, 0.0)]})
    assert svg.startswith("<svg") and "false alarms" in svg and "guessing" in svg
    assert "the guarantee allows" in trade_off([(0.001, 0.01), (1.0, 1.0)])
