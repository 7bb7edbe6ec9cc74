"""Class probabilities for the images of a loader: the one path for validation, test and prediction."""

from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm

from models.clip import CLIPModel


@torch.no_grad()
def predict_probs(
    model: CLIPModel,
    class_features: torch.Tensor,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    autocast: torch.autocast,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax of logit_scale * cosine over the C classes, in the loader's order: (N, C) float64 and labels
    (N,).

    The model is left in the mode it was given in; give it in evaluation mode.
    """
    logits, labels = [], []
    for images, batch_labels, _ in tqdm(loader, desc="validating", leave=False, disable=None):
        with autocast:
            image_features = model.encode_image(images.to(device, non_blocking=True))  # (B, D)
        logits.append(model.logit_scale.exp() * image_features @ class_features.T)  # (B, C)
        labels.append(batch_labels)
    return torch.cat(logits).double().softmax(dim=1).cpu().numpy(), torch.cat(labels).numpy()
