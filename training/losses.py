"""Contrastive losses between B image features and C class-sentence features, averaged over images."""

import torch
import torch.nn.functional as F


def image_to_text(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each image over all C class sentences. logits (B, C), labels (B,)."""
    return F.cross_entropy(logits, labels)


def text_to_image(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each label's sentence over the B images, every image of the same class a positive. logits (B, C),
    labels (B,).

    UniCL's text half (Yang et al. 2022, arXiv 2204.03610) less its constant: where n_c images share class
    c, a perfect model would score ln n_c, so that losses of different batches could not be compared.
    Subtracting the entropy of the targets leaves every gradient as it is and makes the floor 0.
    """
    of_label = logits.log_softmax(dim=0).gather(1, labels[:, None]).squeeze(1)  # (B,)
    ones = torch.ones_like(of_label)
    positives = ones.new_zeros(logits.shape[1]).index_add_(0, labels, ones)[labels]  # (B,) n_c
    return -(of_label + positives.log()).mean()


def contrastive_loss(
    kind: str, logits: torch.Tensor, labels: torch.Tensor, log_prior: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss to minimise and its image-to-text part over all classes (for the log), from logits (B, C).

    unicl: class-aware in both directions; equal to `clip` when all labels of the batch differ and cover
    the classes.
    clip: InfoNCE over the B image-sentence pairs (Radford et al. 2021), same-class pairs taken for negatives.
    ce: image to text only.

    log_prior (C,): tau times the log of the classes' frequencies, added to the logits where each image is
    scored over the classes, so that the logits themselves need not know which class is frequent: logit
    adjustment (Menon et al. 2021, arXiv 2007.07314, eq. 10). The text half, a softmax over images, has no
    such prior.
    """
    over_classes = image_to_text(logits if log_prior is None else logits + log_prior, labels)
    if kind == "ce":
        return over_classes, over_classes
    if kind == "unicl":
        return (over_classes + text_to_image(logits, labels)) / 2, over_classes
    if kind == "clip":
        pairs = logits[:, labels]  # (B, B): image i against the sentence of image j
        diagonal = torch.arange(len(labels), device=logits.device)
        return (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2, over_classes
    raise ValueError(f"unknown loss {kind!r}")
