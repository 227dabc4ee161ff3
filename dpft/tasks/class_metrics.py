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
        wanted, found = np.array(self._wanted), np.array(self._found)
        likely = np.concatenate(self._likely).astype(np.float64)
        bins = reliability(likely.max(1), wanted == found)
        numbers = np.arange(likely.shape[1])
        each = label_figures(self._labels, wanted[:, None] == numbers, found[:, None] == numbers, likely)
        return {
            "accuracy": float((wanted == found).mean()),
            "macro_f1": mean_figure(each, "f1"),
            "ece": sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(wanted),
            "examples": len(wanted),
            "per_class": each,
            "reliability": bins,
        }


def reliability(confidence: "np.ndarray[Any, Any]", right: "np.ndarray[Any, Any]") -> list[dict[str, Any]]:
    """Bin m of M holds the confidences in ((m - 1)/M, m/M]."""
    places = np.ceil(confidence * BINS)
    return [
        {
            "confidence": float(confidence[places == place].mean()),
            "accuracy": float(right[places == place].mean()),
            "count": int((places == place).sum()),
        }
        for place in np.unique(places)
    ]


def label_figures(
    labels: Sequence[str], wanted: "np.ndarray[Any, Any]", found: "np.ndarray[Any, Any]", likely: "np.ndarray[Any, Any]"
) -> dict[str, dict[str, Any]]:
    """Figures of each label that occurs: precision, recall, F1, average precision and count.

    Args:
        wanted, found: ``(n, K)``, whether a row has a label, and whether the model names it.
        likely: ``(n, K)`` scores.
    """
    from sklearn.metrics import average_precision_score

    right, named, there = (rows.sum(0) for rows in (wanted & found, found, wanted))
    return {
        labels[i]: {
            "precision": float(right[i] / max(named[i], 1)),
            "recall": float(right[i] / there[i]),
            "f1": float(2 * right[i] / (named[i] + there[i])),
            "average_precision": float(average_precision_score(wanted[:, i], likely[:, i])),
            "count": int(there[i]),
        }
        for i in np.flatnonzero(there).tolist()
    }


def mean_figure(each: Mapping[str, Mapping[str, Any]], figure: str) -> float:
    """The mean over labels; zero if none occurs."""
    return float(sum(one[figure] for one in each.values())) / max(len(each), 1)
