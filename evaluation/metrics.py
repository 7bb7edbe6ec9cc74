"""Metrics: pure functions of probabilities (N, C) and labels (N,). Fractions, not percent."""

import numpy as np
from sklearn.metrics import balanced_accuracy_score, f1_score


def classification_metrics(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall of the classes present), macro-F1 and cross-entropy loss.

    The class is the one of highest probability. The loss is the mean of -log p(label) over images, in nats.
    """
    predictions = probs.argmax(1)
    of_label = probs[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "loss": float(-np.log(np.maximum(of_label, 1e-12)).mean()),
        "acc": float((predictions == labels).mean()),
        "balanced_acc": float(balanced_accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, average="macro", zero_division=0)),
    }


def majority_baseline(train_labels: np.ndarray, val_labels: np.ndarray) -> tuple[int, float]:
    """The most frequent training class and its share of the validation images: a score that means nothing."""
    majority = int(np.bincount(train_labels).argmax())
    return majority, float((val_labels == majority).mean())
