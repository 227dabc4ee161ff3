"""Chats: the assistant's turns are learned, all of them and nothing else, or the chat is refused."""

import json

import datasets
import numpy as np
import pytest
import transformers
from click.testing import CliRunner

from dpft.audit.canaries import Planting, features, make
from dpft.cli import main
from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import CausalLM
from dpft.tasks.losses import IGNORED
from dpft.training.data import load
from tests.support.recipes import GOOD
from tests.support.texts import proven, tokenizer
from tests.tasks.test_contract import text

# What is asked begins with w50, what is answered with w51; each turn ends with the end-of-text token.
BEGINS = "{{ 'w51 ' if m.role == 'assistant' else 'w50 ' }}"
ASKS = "{% if add_generation_prompt %}w51 {% endif %}"
PLAIN = "{% for m in messages %}" + BEGINS + "{{ m.content }} <eos> {% endfor %}" + ASKS
MARKED = (
    "{% for m in messages %}" + BEGINS + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos> "
    "{% endgeneration %}{% else %}{{ m.content }} <eos> {% endif %}{% endfor %}" + ASKS
)
LAST_ALONE = "{% for m in messages %}" + BEGINS + "{% if loop.last %}{{ m.content }} {% endif %}{% endfor %}" + ASKS
PICKY = "{{ raise_exception('Roles must alternate') if messages[0].role != 'user' }}" + PLAIN
UNMARKED = (
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
)


def say(role, content):
    return {"role": role, "content": content}


CHATS = [
    [say("user", "w1 w2"), say("assistant", "w3 w4 w5")],
    [say("system", "w9"), say("user", "w1"), say("assistant", "w6"), say("user", "w7"), say("assistant", "w8 w10")],
    [say("user", "w1 w1 w1 w1"), say("assistant", "w2")],
]


def task(template=PLAIN, **settings):
    made = tokenizer()
    made.chat_template = template
    return CausalLM(made, messages="messages", **settings)


def learned(made, one):
    return made.tokenizer.decode([label for label in one["labels"] if label != IGNORED])


def tables(**settings):
    return {**GOOD, "subset": "all", "task": {"name": "causal_lm", "messages": "messages", **settings}}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_every_turn_of_the_assistant_is_learned_with_its_end_and_nothing_else(template):
    """T23."""
    made = task(template)
    found = made.encode({"messages": CHATS})
    assert [learned(made, one) for one in found] == ["w3 w4 w5 <eos>", "w6 <eos> w8 w10 <eos>", "w2 <eos>"]
    whole = made.tokenizer.decode(found[1]["input_ids"])
    assert whole == "w50 w9 <eos> w50 w1 <eos> w51 w6 <eos> w50 w7 <eos> w51 w8 w10 <eos>"
    for one in found:
        assert all(label in (IGNORED, token) for label, token in zip(one["labels"], one["input_ids"], strict=True))


def test_the_beginning_is_cut_first_and_then_the_last_answer_s_end():
    made = task(max_length=6)
    (found,) = made.encode({"messages": CHATS[1:2]})
    assert made.tokenizer.decode(found["input_ids"]) == "w7 <eos> w51 w8 w10 <eos>"
    (long,) = made.encode({"messages": [[say("user", "w1"), say("assistant", "w2 w3 w4 w5 w6 w7 w8")]]})
    assert made.tokenizer.decode(long["input_ids"]) == "w51 w2 w3 w4 w5 w6" and len(learned(made, long).split()) == 5


@pytest.mark.parametrize(
    ("template", "chat", "said"),
    [
        (LAST_ALONE, CHATS[1], "a chat of 5 messages of which .* add number 3 to what .* {% generation %}"),
        (UNMARKED, CHATS[0], "the template marks no word of the assistant"),
        (PICKY, CHATS[1], r"a chat of 5 messages that the template refuses \(Roles must alternate\)"),
        ("{{ messages[0].content + 1 }}", CHATS[0], r"that the template refuses \(TypeError\)"),
        (PLAIN, CHATS[0][:1], "a chat of 1 messages in column 'messages' with none of the role assistant"),
        (PLAIN, [{"role": "assistant"}], "no chat in column 'messages': write a list of objects with a role"),
        (PLAIN, "w1", "has a text in column 'messages', not a list of messages"),
        (PLAIN, [], "no chat in column 'messages'"),
    ],
)
def test_what_does_not_tell_the_assistant_s_words_is_refused_unquoted(template, chat, said):
    with pytest.raises(RecipeError, match=f"Row 1 of 1 .*{said}") as error:
        task(template).encode({"messages": [chat]})
    assert "w1" not in str(error.value)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(RecipeError, match="has no chat template, .* declare one in task.template"):
        task(None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "a", "response": "b"}, "task.messages and task.prompt name two forms of the data"),
        ({"messages": None, "template": PLAIN}, "task.template writes chats, and task.messages names no column"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(tables(**settings))


def test_its_gradients_are_exact_and_its_loss_is_the_model_s_own(case, plan):
    assert proven(task(), case("llama").model, {"messages": CHATS}, plan()).exact


def test_its_canaries_are_judged_by_the_answer():
    made, recipe = task(max_length=40), Recipe.parse(tables())
    rows = datasets.Dataset.from_dict({"messages": CHATS})
    planted = make(Planting(canaries=20), recipe, made).planted(rows, recipe)
    assert len(planted) > 3 and planted.features == rows.features
    record = made.follow("w1 w2", "w3 w4")
    (one,) = made.encode({name: [value] for name, value in record.items()})
    assert learned(made, made.judged(one, "w1 w2")) == "w3 w4"
    canaries = make(Planting(canaries=10, kind="new-token"), recipe, made).canaries
    judged = [learned(made, one) for one in features(canaries, recipe, made)]
    assert judged == [canary.record["messages"][1]["content"].strip() for canary in canaries]
    assert made.canary(np.random.default_rng(0)) != made.canary(np.random.default_rng(1))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_chats_in_a_file_train(tmp_path, ending):
    text(tmp_path / "model")
    rows, path = [{"messages": CHATS[i % 3]} for i in range(12)], tmp_path / f"train.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    settings = tables(template=PLAIN) | {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(path), "validation": str(path), "units": 12},
        "privacy": {"noise_multiplier": 1.0, "delta": 1e-2, "batch_size": 4, "steps": 2},
        "run": {"token_budget": 256},
    }
    recipe = Recipe.parse(settings)
    assert load(recipe)[0]["messages"][1] == CHATS[1]
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    done = CliRunner().invoke(main, ["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "private" / "metrics.json").read_text())
    assert metrics["examples"] == 12 and metrics["tokens"] == 4 * (4 + 5 + 2)
    (saved,) = {file.parent for file in (tmp_path / "run").rglob("tokenizer.json")}
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == PLAIN
