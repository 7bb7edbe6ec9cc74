import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.losses import contrastive_loss


def log_softmax64(x, axis):
    x = x - x.max(axis=axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def unicl_reference(logits, labels):
    """Yang et al. 2022, eq. 2 to 4, sums written out: text half over all positives, less the entropy of its
    targets.
    """
    n = len(labels)
    over_classes = -np.mean([log_softmax64(logits, 1)[i, labels[i]] for i in range(n)])
    over_batch = log_softmax64(logits, 0)
    text = 0.0
    for j in range(n):  # the sentence of image j against all images
        positives = [k for k in range(n) if labels[k] == labels[j]]
        text += -sum(over_batch[k, labels[j]] for k in positives) / len(positives) - np.log(len(positives))
    return (over_classes + text / n) / 2


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(7, 4, dtype=torch.float64) * 5, torch.tensor([0, 2, 2, 3, 2, 0, 3])


def test_unicl_equals_the_formula(batch):
    logits, labels = batch
    loss, over_classes = contrastive_loss("unicl", logits, labels)
    assert loss.item() == pytest.approx(unicl_reference(logits.numpy(), labels.numpy()), abs=1e-12)
    assert over_classes.item() == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["ce", "unicl"])
def test_logit_adjustment_weighs_each_class_by_its_frequency_in_the_softmax(batch, kind):
    """Menon et al. 2021, eq. 10: -log of pi_y e^f_y / sum_c pi_c e^f_c; the text half as without it."""
    logits, labels = batch
    prior = np.array([0.6, 0.3, 0.02, 0.08])
    weighed = prior * np.exp(logits.numpy())
    expected = -np.mean(np.log(weighed[np.arange(7), labels] / weighed.sum(1)))
    loss, over_classes = contrastive_loss(kind, logits, labels, torch.from_numpy(prior).log())
    assert over_classes.item() == pytest.approx(expected, abs=1e-12)
    if kind == "unicl":
        plain = F.cross_entropy(logits, labels).item()
        expected += 2 * unicl_reference(logits.numpy(), labels.numpy()) - plain
        expected /= 2
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_unicl_gradient_is_the_published_losss_gradient(batch):
    logits, labels = batch
    own = logits.clone().requires_grad_()
    contrastive_loss("unicl", own, labels)[0].backward()
    published = logits.clone().requires_grad_()
    same = (labels[:, None] == labels[None]).double()
    targets = same / same.sum(0)  # of text j over images k
    text_to_image = -(targets * published.log_softmax(0)[:, labels]).sum(0).mean()
    ((F.cross_entropy(published, labels) + text_to_image) / 2).backward()
    torch.testing.assert_close(own.grad, published.grad, rtol=0, atol=1e-12)


def test_unicl_equals_clip_when_all_labels_differ():
    torch.manual_seed(2)
    image, text = (F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=1) for _ in range(2))
    logits, labels = 20 * image @ text.T, torch.randperm(6)
    # Radford et al. 2021, figure 3, on the pairs of the batch
    pairs = 20 * image @ text[labels].T
    diagonal = torch.arange(6)
    expected = (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2
    for kind in ("unicl", "clip"):
        assert contrastive_loss(kind, logits, labels)[0].item() == pytest.approx(expected.item(), abs=1e-12)


def test_perfect_features_reach_zero_though_classes_repeat_and_the_clip_loss_does_not():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    text = torch.eye(3, dtype=torch.float64)
    logits = 100 * text[labels] @ text.T
    assert contrastive_loss("unicl", logits, labels)[0].item() == pytest.approx(0, abs=1e-9)
    floor = (3 * np.log(3) + 2 * np.log(2)) / 6  # sum n_c ln n_c / B
    assert contrastive_loss("clip", logits, labels)[0].item() == pytest.approx(floor, abs=1e-9)


def test_ce_is_cross_entropy_and_an_unknown_name_is_refused(batch):
    over_classes = pytest.approx(F.cross_entropy(*batch).item())
    assert contrastive_loss("ce", *batch)[0].item() == over_classes
    assert all(contrastive_loss(kind, *batch)[1].item() == over_classes for kind in ("ce", "unicl", "clip"))
    with pytest.raises(ValueError, match="unknown loss"):
        contrastive_loss("focal", *batch)
