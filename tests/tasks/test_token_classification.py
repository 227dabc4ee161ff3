"""Tags of words: at a word's first token, scored by whole entities."""

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.modeling_outputs import TokenClassifierOutput

from dpft.errors import RecipeError
from dpft.recipe import Recipe
from dpft.tasks import TokenClassification
from dpft.tasks.losses import IGNORED
from dpft.tasks.own_loss import check_own_loss
from dpft.tasks.token_classification import entities
from dpft.training.data import check
from dpft.training.files import read
from tests.support.recipes import GOOD

TAGS = ["O", "B-drug", "I-drug", "B-dose"]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<unk>", "take", "asp", "##irin", "now", "100", "mg"]
    raw = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")


def test_a_word_s_tag_stands_at_its_first_token(tokenizer):
    task = TokenClassification(tokenizer, TAGS)
    (found,) = task.encode({"tokens": [["take", "aspirin", "100"]], "tags": [["O", "B-drug", "B-dose"]]})
    assert found == {"input_ids": [2, 3, 4, 6], "labels": [0, 1, IGNORED, 3]}
    task.max_length = 3
    (found,) = task.encode({"tokens": [["take", "aspirin", "100"]], "tags": [["O", "B-drug", "B-dose"]]})
    assert found == {"input_ids": [2, 3, 4], "labels": [0, 1, IGNORED]}


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        (["O"], "Row 1 has 2 words in column 'tokens' and 1 tags in column 'tags'"),
        (["O", "B-name"], "Row 1 has a label in column 'tags' .* not among the 4 declared"),
        (["O", None], "Row 1 has no label in column 'tags'"),
    ],
)
def test_what_is_no_tag_for_each_word_is_refused(tokenizer, tags, said):
    with pytest.raises(RecipeError, match=said) as error:
        TokenClassification(tokenizer, TAGS).encode({"tokens": [["take", "aspirin"]], "tags": [tags]})
    assert "B-name" not in str(error.value)


def test_the_loss_is_the_model_s_own(tokenizer):
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=4
    )
    task = TokenClassification(tokenizer, TAGS)
    features = task.encode({"tokens": [["take", "aspirin"], ["now"]], "tags": [["O", "B-drug"], ["O"]]})
    check_own_loss(task, transformers.BertForTokenClassification(config), task.collate, features)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-a I-a B-a", [("a", 0, 2), ("a", 2, 3)]),
        ("O I-a I-a O", [("a", 1, 3)]),  # begun by an I-
        ("B-a I-b", [("a", 0, 1), ("b", 1, 2)]),
        ("noun noun O verb", [("noun", 0, 2), ("verb", 3, 4)]),
        ("B-x-ray I-x-ray", [("x-ray", 0, 2)]),
    ],
)
def test_entities_are_those_of_conll(tags, expected):
    assert entities(tags.split()) == expected


def test_metrics_count_whole_entities(tokenizer):
    task = TokenClassification(tokenizer, TAGS)
    wanted = torch.tensor([[0, 1, 2, 3], [1, 2, IGNORED, 0]])
    guessed = torch.tensor([[0, 1, 2, 0], [1, 0, 3, 0]])  # one drug right, one too short, the dose missed

    def model(**batch):
        return TokenClassifierOutput(logits=torch.nn.functional.one_hot(guessed, 4).float())

    found = task.evaluate(model, [{"input_ids": None, "labels": wanted}])
    assert (found["entity_precision"], found["entity_recall"]) == (1 / 2, 1 / 3)
    assert found["entity_f1"] == pytest.approx(0.4) and found["token_accuracy"] == 5 / 7
    assert found["per_entity"]["drug"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "count": 2}
    assert found["per_entity"]["dose"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "count": 1}


def test_lists_of_words_and_tags_are_checked_before_anything_else(tmp_path):
    recipe = Recipe.parse({**GOOD, "task": {"name": "token_classification", "labels": TAGS}})

    def checked(**columns):
        check(datasets.Dataset.from_dict(columns), recipe.task, recipe.data, "data.train")

    checked(tokens=[["a", "b"]], tags=[["O", "B-drug"]])
    for columns, said in (
        (dict(tokens=["a b"], tags=[["O"]]), "row 1 has a text in column 'tokens', not a list of texts"),
        (dict(tokens=[["a"], []], tags=[["O"], []]), "row 2 has an empty list in column 'tokens'"),
        (dict(tokens=[["a"]], tags=[["B-name"]]), "row 1 has a label in column 'tags' .* not among the 4 declared"),
        (dict(tokens=[["a"]]), "no column 'tags'"),
    ):
        with pytest.raises(RecipeError, match=said):
            checked(**columns)


def test_lists_of_class_numbers_are_their_names(tmp_path):
    names = datasets.Features(
        tokens=datasets.List(datasets.Value("string")), tags=datasets.List(datasets.ClassLabel(names=TAGS))
    )
    datasets.Dataset.from_dict(dict(tokens=[["a", "b"]], tags=[[0, 3]]), features=names).save_to_disk(tmp_path / "rows")
    assert list(read(str(tmp_path / "rows"))["tags"]) == [["O", "B-dose"]]
