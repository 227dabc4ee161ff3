"""A head that is learned by itself: features, what is counted and charged, resumption, what is saved."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from dpft.errors import BudgetError, GuaranteeError, IsolationError, PlanError, RecipeError, SubsetError
from dpft.ledger import Ledger
from dpft.privacy.mechanisms.head_descent import HeadDescent
from dpft.privacy.mechanisms.linear_head import Head
from dpft.privacy.noise import SeededRandomness
from dpft.privacy.plan import Plan
from dpft.recipe import Recipe
from dpft.runs import RunFolder
from dpft.runs.sums import KeptSums
from dpft.subset.evaluating import evaluating
from dpft.tasks.pooling import mean_pooled
from dpft.tasks.task import made_up
from dpft.training import head as module
from dpft.training.features import check_isolated, features_of, output_layer
from dpft.training.head import HeadSession
from dpft.workflows.compare import compare
from dpft.workflows.setup import set_up
from dpft.workflows.train import train

STEPS = 20


@pytest.fixture
def tables(recipe):
    privacy = {"epsilon": 8.0, "delta": 1e-3, "steps": STEPS, "method": "head-descent"}
    return {**recipe, "subset": "head", "privacy": privacy, "run": {"seed": 3}}


@pytest.fixture
def make(tables, tmp_path):
    setup = set_up(Recipe.parse(tables))

    def session(folder="run", **fields):
        plan = fields.pop("plan", Recipe.parse(tables).plan())
        model, task = fields.pop("model", setup.model), fields.pop("task", setup.task)
        fields = {"randomness": SeededRandomness(0), **fields}
        return HeadSession(model, plan, task, fields.pop("rows", setup.train), tmp_path / folder, **fields)

    return session


class Killed(BaseException):
    """Ends a run as a signal does: nobody catches it."""


def killed_after(monkeypatch, releases, *, kept):
    """The process dies at a sum that was counted: when it was kept, or just before."""
    keep, done = KeptSums.keep, []

    def counted(self, value):
        if len(done) == releases and not kept:
            raise Killed
        keep(self, value)
        done.append(value)
        if len(done) > releases:
            raise Killed

    monkeypatch.setattr(KeptSums, "keep", counted)


def weights(session):
    return session.model.classifier.weight.detach().clone(), session.model.classifier.bias.detach().clone()


def test_a_recipe_leaves_an_ordinary_model_and_a_card(tables, tmp_path):
    folder = train(Recipe.parse(tables), tmp_path / "run")
    record = RunFolder(folder).record()
    assert record.released_steps == record.planned_steps == STEPS and record.epsilon <= 8.0
    (event,) = record.events
    assert (event.count, event.sample_rate) == (STEPS, 1.0) and record.examples_per_unit is None
    layer = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "weights").classifier
    assert record.trainable_parameters == layer.weight.numel() + layer.bias.numel()
    found = transformers.pipeline("text-classification", model=str(folder / "weights"))("w1 w2 w3")
    assert found[0]["label"] in "abc"
    card = (folder / "card.md").read_text()
    assert "full-batch gradients" in card and "second moment" in card and "every unit is in every sum" in card


def test_only_the_output_layer_changes(make):
    session = make()
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    session.solve()
    changed = {name for name, t in session.model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_what_the_layer_is_given_makes_the_logits(make):
    session = make()
    with evaluating(session.model), torch.no_grad():
        batch = session.collated(list(session.examples.features))
        head = output_layer(session.model, batch)
        features = features_of(session.model, head, batch)
        logits = session.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    assert head.name == "classifier"
    assert torch.allclose(features @ head.layer.weight.T + head.layer.bias, logits, atol=1e-6)


def test_without_noise_it_learns_what_descent_on_the_model_itself_learns(make):
    """The head's loss on its training rows is below that of the untouched head, and near the best there is."""
    session = make(plan=Plan(mechanism=HeadDescent(noise_multiplier=0.0, steps=200), delta=1e-3, units=40))
    before = session.evaluate(session.rows)
    session.solve()
    after = session.evaluate(session.rows)
    assert after["accuracy"] > max(0.6, before["accuracy"])
    assert "NOT PRIVATE" in session.guarantee


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("releases", [0, 2, 9])
def test_a_killed_run_goes_on_to_the_same_head(make, monkeypatch, releases, kept):
    """Noise that was not drawn yet is drawn anew, so next to none is used here. A sum that was lost stays lost."""
    plan = Plan(mechanism=HeadDescent(noise_multiplier=1e-9, steps=STEPS), delta=1e-3, units=40)
    whole = make("whole", plan=plan)
    whole.solve()
    wanted = weights(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, releases, kept=kept)
        make(plan=plan).solve()
    again = make(plan=plan)
    counted = again.released
    assert counted == sum(plan.mechanism.sums()[: releases + 1])
    with pytest.raises(BudgetError, match=f"has released {counted:,} steps"):
        make(plan=plan).solve()
    again.solve(go_on=True)
    assert again.released == STEPS
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(weights(again), wanted, strict=True))
    assert same == kept and all(t.isfinite().all() for t in weights(again))


def test_a_finished_run_is_made_again_without_a_release(make, monkeypatch):
    session = make()
    session.solve()
    wanted = weights(session)
    nn.init.zeros_(session.model.classifier.weight)
    monkeypatch.setattr(type(session.releases), "charge", None)
    again = make()
    again.solve(go_on=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), wanted, strict=True))


def test_a_sum_that_was_counted_and_not_kept_stays_lost(make, tmp_path):
    session = make()
    session.solve()
    kept = RunFolder(tmp_path / "run").sums_file
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-5])  # the last one was written in part
    with KeptSums(tmp_path / "run") as sums:
        known = sums.known(session.plan.mechanism.sums(), STEPS)
    assert known[-1] is None and all(value is not None for value in known[:-1])
    with KeptSums(tmp_path / "run") as sums:
        again = sums.known(session.plan.mechanism.sums(), STEPS)
    assert [value is None for value in again] == [value is None for value in known]


def test_more_sums_than_were_counted_are_refused(make, tmp_path):
    session = make()
    session.solve()
    with KeptSums(tmp_path / "run") as sums, pytest.raises(GuaranteeError, match="were counted"):
        sums.known(session.plan.mechanism.sums(), 3)


def test_every_release_is_counted_and_paid_before_it_happens(make, monkeypatch):
    """T15."""
    session, seen = make(), []
    keep = KeptSums.keep

    def watched(self, value):
        seen.append(session.releases.charged)
        keep(self, value)

    monkeypatch.setattr(KeptSums, "keep", watched)
    session.solve()
    assert seen == np.cumsum(session.plan.mechanism.sums()).tolist()


def test_the_ledger_pays_for_all_of_it_or_nothing(tables, tmp_path):
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    ledger = Ledger(str(tmp_path / "ledger.db"), create=True)
    ledger.create("notes", epsilon=12.0, delta=1e-3, rows=rows)
    tables["ledger"] = {"dataset": "notes", "url": str(tmp_path / "ledger.db")}
    folder = train(Recipe.parse(tables), tmp_path / "run")
    account = RunFolder(folder).record().ledger
    assert account.runs == 1 and 7.9 < account.spent <= 8.0
    with pytest.raises(BudgetError):
        train(Recipe.parse(tables), tmp_path / "second")
    assert not (tmp_path / "second" / "sums.npy").exists()
    assert ledger.dataset("notes").spent() == pytest.approx(account.spent)


def test_units_of_several_rows_count_once(tables, tmp_path):
    tables["data"] |= {"unit": "patient", "units": 12}
    tables["privacy"]["delta"] = 1e-2
    folder = train(Recipe.parse(tables), tmp_path / "run")
    assert "all rows that share one value of patient" in (folder / "card.md").read_text()


def test_a_comparison_has_heads_with_and_without_privacy(tables, tmp_path, monkeypatch):
    """The features are made once for all of its runs."""
    made, calls = HeadSession._made_features, []
    monkeypatch.setattr(HeadSession, "_made_features", lambda self, head: calls.append(1) or made(self, head))
    rows = compare(Recipe.parse(tables), tmp_path / "sweep", epsilons=[8.0, 1.0]).rows()
    assert [row.setting for row in rows] == ["untouched", "non-private", "ε = 8", "ε = 1"] and len(calls) == 1


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("subset", "head + norms", "learns the head alone"),
        ("privacy.epochs", 3.0, "privacy.epochs is set"),
        ("privacy.clipping", "automatic", "privacy.clipping is set"),
        ("data.examples_per_unit", 2, "data.examples_per_unit is set"),
        ("optimizer.learning_rate", 0.1, "optimizer is set"),
        ("privacy.batch_size", 8, "privacy.batch_size is set"),
    ],
)
def test_what_a_head_does_not_use_is_refused(tables, key, value, message):
    tables["data"]["unit"] = "patient"
    *parents, last = key.split(".")
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = value
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(tables)


def test_the_method_follows_from_the_noise(tables):
    many = [f"label {place}" for place in range(100)]
    del tables["privacy"]["method"]
    for changes, method in (
        (dict(units=2_000), "head-centred"),
        (dict(units=9_000), "head-descent"),
        (dict(units=9_000, labels=many), "head-centred"),
        (dict(units=9_000, epsilon=0.1), "head-centred"),
        (dict(units=40, epsilon=None, noise_multiplier=0.0), "head-descent"),
    ):
        facts = {"epsilon": 3.0, "delta": 1e-5, "units": 9_000, "labels": tables["task"]["labels"], **changes}
        asked = copy.deepcopy(tables)
        for table, keys in (("data", ["units"]), ("task", ["labels"])):
            asked[table] |= {key: facts.pop(key) for key in keys}
        asked["privacy"] |= facts
        assert Recipe.parse(asked).method == method, changes


def test_the_method_follows_from_the_batch_size(tables):
    del tables["privacy"]["method"]
    tables["privacy"]["batch_size"] = 10
    assert Recipe.parse(tables).plan().mechanism.name == "dp-sgd"
    del tables["privacy"]["batch_size"]
    tables["subset"] = "lora"
    with pytest.raises(RecipeError, match="privacy.batch_size is missing"):
        Recipe.parse(tables)


# -- models ----------------------------------------------------------------------------------------------------------


def scaled(model):
    inner = model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits * 2.0
        return output

    model.forward = forward
    return model


def test_logits_that_no_layer_makes_are_refused(make):
    session = make()
    with pytest.raises(SubsetError, match="not what one linear layer gives"):
        make(model=scaled(session.model)).solve()
    assert session.released == 0


def test_a_plan_without_a_declared_number_is_refused_before_anything(make):
    session = make(plan=Plan(mechanism=HeadDescent(noise_multiplier=9.0, steps=STEPS), delta=1e-3))
    with pytest.raises(PlanError, match="declares no number of units"):
        session.solve()
    assert session.released == 0


def test_features_that_follow_other_examples_are_refused():
    with pytest.raises(IsolationError, match="change by"):
        check_isolated(lambda some: torch.ones(len(some), 2) * len(some), [1, 2, 3])


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "dinov2"])
def test_the_output_layer_of_every_family_is_found(case, family):
    made = case(family)
    with evaluating(made.model), torch.no_grad():
        batch = made.batch(made.examples)
        head = output_layer(made.model, batch)
        features = features_of(made.model, head, batch)
        logits = made.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    bias = 0 if head.layer.bias is None else head.layer.bias
    if logits.dim() == 2:
        assert torch.allclose(features @ head.layer.weight.T + bias, logits, atol=1e-5)


def test_the_head_is_written_where_it_belongs(make):
    session = make()
    with evaluating(session.model), torch.no_grad():
        layer = output_layer(session.model, made_up(session.task))
    found = Head(torch.ones(3, layer.layer.in_features).double(), torch.arange(3).double())
    module.put(layer, found)
    assert session.model.classifier.bias.tolist() == [0.0, 1.0, 2.0]


# -- the mean over tokens --------------------------------------------------------------------------------------------

ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
    "electra": (transformers.ElectraConfig, transformers.ElectraForSequenceClassification),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_the_classifier_is_given_the_mean_over_tokens(family, tmp_path):
    """Of the states of all tokens but padding, centred and brought to one length by the block's normalisation."""
    config, kind = ENCODERS[family]
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    model = kind(
        config(**small, num_labels=3, embedding_size=16) if family == "electra" else config(**small, num_labels=3)
    )
    model.eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        states = model.base_model(**batch).last_hidden_state
        assert mean_pooled(model)
        head = output_layer(model, batch)
        features = features_of(model, head, batch)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    wanted = nn.functional.layer_norm(mean, (16,))
    for row, other in zip(features, wanted, strict=True):
        assert float(nn.functional.cosine_similarity(row, other, dim=0)) > 0.999
    norms = features.norm(dim=1)
    assert float(norms.max() / norms.min()) < 1.01
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, model(**batch).logits, atol=1e-6)


def test_another_architecture_keeps_its_own_pooling(case):
    model = case("llama").model
    before = json.dumps(model.config.to_dict(), default=str)
    assert not mean_pooled(model) and json.dumps(model.config.to_dict(), default=str) == before


def test_a_recipe_may_ask_for_either_pooling(tables, tmp_path):
    depths = {}
    for pooling in ("auto", "mean", "model"):
        tables["task"] |= {"pooling": pooling}
        depths[pooling] = set_up(Recipe.parse(tables)).model.config.num_hidden_layers
    assert depths["auto"] == depths["mean"] == depths["model"] + 1
    tables["task"] |= {"pooling": "auto"}
    tables |= {"subset": "lora + head", "privacy": tables["privacy"] | {"batch_size": 10, "method": "auto"}}
    assert set_up(Recipe.parse(tables)).model.config.num_hidden_layers == depths["model"]
