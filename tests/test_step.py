from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from models.clip import ClassSentences, build_clip
from training.cutmix import opposite
from training.losses import contrastive_loss
from training.step import loss_and_gradients, parts_of, step_model_of

LABELS = torch.tensor([0, 1, 1, 2, 0, 1, 1])
TEXTS = {"正常": ["正常"], "肺炎": ["肺炎"], "气胸": ["气胸"]}
TABLE = "text_tower.encoder.embeddings.word_embeddings.weight"
SCALER = torch.amp.GradScaler(enabled=False)


def a_model(encoder, size, rows=False, **options):
    """In float64, with dropout in the text tower, and the class sentences. rows: as a run trains it."""
    torch.manual_seed(1)
    options |= {"img_size": size, "embed_dim": 16, "temperature": 0.1, "image_weights": "none"}
    model = build_clip(encoder, "bert-tiny-bytes", **options).double()
    for module in model.text_tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    sentences = ClassSentences(model, TEXTS)
    if rows and model.text_tower not in model.frozen:
        model.text_tower.train_only(sentences.tokens)
    sentences.prepare(torch.device("cpu"), center=True)
    return model.train(), sentences.for_step(torch.Generator())


def images_of(size):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (len(LABELS), 3, size, size), dtype=torch.uint8, generator=generator)


def state_of(model, tokens):
    """Of what a run trains: of the table of embeddings the rows of `tokens`."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if TABLE in gradients:
        gradients[TABLE.replace("weight", "rows")] = gradients.pop(TABLE)[tokens.unique()]
    return gradients, {name: value for name, value in model.named_buffers() if "running" in name}


def of_the_step(encoder, size, kind, most, **options):
    model, texts = a_model(encoder, size, rows=True, **options)
    torch.manual_seed(3)
    parts = parts_of(images_of(size), torch.arange(len(LABELS)), most)
    assert most is None or max(len(own) for own, _ in parts) <= most
    loss, over_classes, logits = loss_and_gradients(
        step_model_of(model), [lambda own=own: own for own, _ in parts], texts, LABELS,
        partial(contrastive_loss, kind), SCALER,
        lambda: torch.autocast("cpu", enabled=False),
    )  # fmt: skip
    return loss, over_classes, logits, *state_of(model, texts.get("input_ids")), torch.rand(2)


def by_the_formula(encoder, size, kind, part_sizes, **options):
    """Everything held at once; only BatchNorm and the random numbers know of parts."""
    model, texts = a_model(encoder, size, **options)
    torch.manual_seed(3)
    features = [model.image_projection(model.image_tower(p)) for p in images_of(size).split(part_sizes)]
    images = F.normalize(torch.cat(features), dim=1)
    pooled = texts["pooled"] if "pooled" in texts else model.text_tower(**texts)
    sentences = F.normalize(model.text_projection(pooled), dim=1)
    logits = model.logit_scale.exp() * images @ sentences.T
    loss, over_classes = contrastive_loss(kind, logits, LABELS)
    loss.backward()
    state = state_of(model, texts.get("input_ids"))
    return loss.detach(), over_classes.detach(), logits.detach(), *state, torch.rand(2)


@pytest.mark.parametrize("kind", ["unicl", "clip", "ce"])
@pytest.mark.parametrize(("most", "part_sizes"), [(None, [7]), (3, [3, 2, 2]), (1, [1] * 7)])
def test_a_batch_in_parts_has_the_loss_and_gradients_of_the_whole(kind, most, part_sizes):
    found = of_the_step("timm:test_vit", 160, kind, most)
    expected = by_the_formula("timm:test_vit", 160, kind, part_sizes)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("options", [{}, {"freeze_image": True}, {"freeze_text": True}])
def test_random_depth_and_batch_statistics_of_a_part_are_the_same_both_times(options):
    """And the running statistics count each part once."""
    found = of_the_step("starnet_dual_pyramid_rcf", 64, "unicl", 4, **options)
    expected = by_the_formula("starnet_dual_pyramid_rcf", 64, "unicl", [4, 3], **options)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_both_times_a_part_is_computed_in_the_same_precision():
    """In bf16 a CPU takes other operations where there is no gradient."""

    def features_of(most):
        model, texts = a_model("starnet_dual_pyramid_rcf", 64)
        model.float()
        seen, encode = [], model.encode_image
        model.encode_image = lambda images: seen.append(encode(images)) or seen[-1]
        texts = {key: value.float() if value.is_floating_point() else value for key, value in texts.items()}
        torch.manual_seed(3)
        loss_and_gradients(
            step_model_of(model),
            [lambda own=own: own for own, _ in parts_of(images_of(64), torch.arange(7), most)],
            texts, LABELS, partial(contrastive_loss, "unicl"), SCALER,
            lambda: torch.autocast("cpu", torch.bfloat16),
        )  # fmt: skip
        return seen

    first, second, first_again, second_again = features_of(4)
    assert torch.equal(first, first_again) and torch.equal(second, second_again)


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("encoder", ["starnet_dual_pyramid_rcf", "resnet18", "efficientnet-b0"])
def test_gradient_checkpointing_changes_nothing_but_the_memory(encoder, most):
    """Random depth and dropout included; an image is counted once in the running statistics."""
    found = of_the_step(encoder, 64, "unicl", most, gradient_checkpointing=True)
    expected = by_the_formula(encoder, 64, "unicl", [7] if most is None else [4, 3])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


def test_gradient_checkpointing_holds_fewer_activations():
    def held(**options):
        model, _ = a_model("starnet_dual_pyramid_rcf", 64, **options)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.encode_image(images_of(64))
        return sum(sizes)

    assert held(gradient_checkpointing=True) < held() / 4


def test_an_encoder_without_gradient_checkpointing_is_refused():
    with pytest.raises(UserError, match="timm:dla34"):
        a_model("timm:dla34", 64, gradient_checkpointing=True)


def test_every_process_has_as_many_parts_and_none_is_empty(monkeypatch):
    """Shares of 3, 2 and 2 images: with parts of one image the first process takes two together, with more
    none is alone.
    """
    monkeypatch.setattr("training.step.n_processes", lambda: 3)
    for most, sizes in ((1, [[2, 1], [1, 1], [1, 1]]), (2, [[3], [2], [2]]), (3, [[3], [2], [2]])):
        for number, own in enumerate(sizes):
            share = slice(*[(0, 3), (3, 5), (5, 7)][number])
            monkeypatch.setattr("training.step.own_share", lambda n, share=share: share)
            parts = parts_of(images_of(32)[share], torch.arange(7), most)
            assert [len(images) for images, _ in parts] == own
            facing = torch.cat([indices.flip(0) for _, indices in parts])
            assert torch.equal(opposite(7, most)[share], facing)  # of labels that every process has
            assert torch.equal(torch.cat([indices for _, indices in parts]), torch.arange(7)[share])


def test_no_part_is_a_single_image():
    """BatchNorm over maps of one pixel would have nothing to compare."""
    for n in range(2, 20):
        images = torch.zeros(n, 3, 2, 2)
        for most in (2, 3, 4):
            sizes = [len(own) for own, _ in parts_of(images, torch.arange(n), most)]
            assert sum(sizes) == n and min(sizes) >= 2 and max(sizes) <= max(most, min(n, 3))
        assert [len(own) for own, _ in parts_of(images, torch.arange(n), 1)] == [1] * n


@pytest.mark.parametrize("processes", [2, 3])
def test_no_part_of_a_process_is_a_single_image(processes, monkeypatch):
    monkeypatch.setattr("training.step.n_processes", lambda: processes)
    for n in range(2 * processes, 30):
        for most in (2, 3, 4):
            n_parts = set()
            for own in torch.arange(n).tensor_split(processes):
                monkeypatch.setattr("training.step.own_share", lambda n, own=own: slice(own[0], own[-1] + 1))
                sizes = [len(i) for _, i in parts_of(torch.zeros(len(own), 3, 2, 2), torch.arange(n), most)]
                assert sum(sizes) == len(own) and min(sizes) >= 2 and max(sizes) <= most + 2
                n_parts.add(len(sizes))
            assert len(n_parts) == 1
