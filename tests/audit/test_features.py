"""Canaries of pictures, in a loop of one's own and in a DPTrainer."""

import numpy as np
import pytest
import torch
import transformers

import dpft
from dpft.audit.features import Training, audit_training, mislabelled, random_inputs
from dpft.audit.report import Claim
from dpft.tasks import LabelledTask

LABELS = 10


def model():
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    shape = dict(image_size=16, patch_size=4, num_channels=1, num_labels=LABELS)
    none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**small, **shape, **none))


@pytest.fixture
def pictures():
    """Forty pictures of ten kinds, each with a bright line."""
    torch.manual_seed(0)
    labels = [i % LABELS for i in range(40)]
    made = [0.3 * torch.randn(1, 16, 16) for _ in labels]
    for picture, label in zip(made, labels, strict=True):
        picture[:, label] += 1
    return [{"pixel_values": picture, "labels": label} for picture, label in zip(made, labels, strict=True)]


@pytest.fixture
def task():
    return LabelledTask(transformers.DefaultDataCollator())


def test_noise_has_the_shape_and_size_of_a_picture(pictures):
    canaries = random_inputs(pictures[0], 200, labels=LABELS)
    assert {canary["labels"] for canary in canaries} == set(range(LABELS))
    for canary in canaries[:5]:
        assert canary["pixel_values"].shape == (1, 16, 16) and canary["pixel_values"].dtype == torch.float32
        assert canary["pixel_values"].std() == pytest.approx(float(pictures[0]["pixel_values"].std()), rel=0.3)
    assert not torch.equal(canaries[0]["pixel_values"], canaries[1]["pixel_values"])


def test_a_mislabelled_picture_has_every_label_but_its_own(pictures):
    found = mislabelled(pictures * 5, labels=4)
    assert all(a["labels"] != b["labels"] for a, b in zip(found, pictures * 5, strict=True))
    assert {canary["labels"] for canary in found} == {0, 1, 2, 3}


def test_a_plain_loop_is_seen_through_and_a_private_trainer_is_not_accused(pictures, task, tmp_path):
    before = model()
    canaries = random_inputs(pictures[0], 120, labels=LABELS)

    def plain(features):
        trained = model()
        optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            task.losses(trained, task.collate(features)).mean().backward()
            optimizer.step()
        return trained

    leaky = audit_training(Training(plain, task, before), pictures, canaries, Claim(1e-3, 0.5))
    assert leaky.verdict == "VIOLATION" and leaky.auc > 0.85

    def private(features):
        trained = model()
        plan = dpft.Plan.calibrate(epsilon=0.5, delta=1e-3, units=100, batch_size=50, steps=20)
        arguments = transformers.TrainingArguments(
            str(tmp_path), learning_rate=1e-3, report_to=[], save_strategy="no", disable_tqdm=True
        )
        dpft.DPTrainer(model=trained, args=arguments, train_dataset=features, plan=plan, task=task).train()
        return trained

    safe = audit_training(Training(private, task, before), pictures, canaries, Claim(1e-3, 0.5))
    assert safe.verdict != "VIOLATION" and safe.auc < leaky.auc
    assert np.isfinite(safe.epsilon_lower_bound) and safe.canary == "features"
