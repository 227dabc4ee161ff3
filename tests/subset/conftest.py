"""A base model on disk that lacks what the task needs."""

import pytest
from transformers import BertForSequenceClassification


@pytest.fixture
def load(case, tmp_path):
    """Makes a BERT classifier from a checkpoint without its classifier."""
    case("bert").model.bert.save_pretrained(tmp_path / "base")
    return lambda kind=BertForSequenceClassification, **more: kind.from_pretrained(
        tmp_path / "base", num_labels=3, **more
    )
