"""How well one of several classes is predicted, and how well the model knows when it is right."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from dpft.tasks.losses import without_labels

BINS = 15


class ClassMetrics:
    """Accuracy, macro-F1 over the labels that occur, each label's F1 and count, and calibration.

    A label's ``average_precision`` is that of its probability as a score for it: the share of rows that have the label
    where the model only guesses, and 1 where it ranks all of them first. A rare label shows there, and not in accuracy.

    ``ece`` is the expected calibration error over ``BINS`` bins of equal width, and ``reliability`` has the bins that
    are not empty: mean confidence, accuracy and count (Guo, Pleiss, Sun, Weinberger 2017, equations 1 to 3). The
    confidence is the softmax probability of the predicted class.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self._wanted: list[int] = []
        self._found: list[int] = []
        self._likely: list[np.ndarray[Any, Any]] = []  # of each batch, (B, K) probabilities

    def update(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        likely = model(**without_labels(batch)).logits.float().softmax(-1)
        self._wanted += batch["labels"].tolist()
        self._found += likely.argmax(-1).tolist()
        self._likely.append(np.nan_to_num(likely.cpu().numpy()))

    def add(self, other: "ClassMetrics") -> None:
        """Take in what another one has seen."""
        self._wanted += other._wanted
        self._found += other._found
        self._likely += other._likely

    def compute(self) -> dict[str, Any]:
        from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support

        wanted, found = self._wanted, self._found
        present = sorted(set(wanted))
        precision, recall, f1, count = precision_recall_fscore_support(wanted, found, labels=present, zero_division=0)
        rows = zip(present, precision, recall, f1, count, strict=True)
        likely = np.concatenate(self._likely).astype(np.float64)
        bins = self._reliability(likely.max(1))
        return {
            "accuracy": float(accuracy_score(wanted, found)),
            "macro_f1": float(f1.mean()),
            "ece": sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(wanted),
            "examples": len(wanted),
            "per_class": {
                self._labels[i]: {
                    "precision": float(p),
                    "recall": float(r),
                    "f1": float(f),
                    "average_precision": float(average_precision_score(np.array(wanted) == i, likely[:, i])),
                    "count": int(n),
                }
                for i, p, r, f, n in rows
            },
            "reliability": bins,
        }

    def _reliability(self, confidence: "np.ndarray[Any, Any]") -> list[dict[str, Any]]:
        """Bin m of M holds the confidences in ((m - 1)/M, m/M]."""
        right = np.array(self._wanted) == np.array(self._found)
        places = np.ceil(confidence * BINS)
        return [
            {
                "confidence": float(confidence[places == place].mean()),
                "accuracy": float(right[places == place].mean()),
                "count": int((places == place).sum()),
            }
            for place in np.unique(places)
        ]
