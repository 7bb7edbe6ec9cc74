import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import UserError
from models.clip import ClassSentences, build_clip

CPU = torch.device("cpu")


def small_clip(**options):
    torch.manual_seed(0)
    return build_clip(
        "resnet18",
        "bert-tiny-bytes",
        img_size=32,
        embed_dim=16,
        temperature=0.05,
        image_weights="none",
        **options,
    )


def bank_of(model, texts):
    bank = ClassSentences(model, texts)
    bank.prepare(CPU, center=False)
    model.train()
    return bank


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_both_towers_give_unit_vectors_and_the_scale_is_the_log_of_the_inverse_temperature(images, mixed):
    model = small_clip()
    tokens, _ = model.text_tower.tokenize(["一", "二"])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        both = model.encode_image(images), model.encode_text(tokens)
    for features in both:
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert model.logit_scale.item() == pytest.approx(math.log(20))


@pytest.mark.parametrize(("log", "scale"), [(9.0, 100), (2.0, math.exp(2)), (-1.0, 1)])
def test_the_scale_is_clamped_to_1_and_100(log, scale):
    model = small_clip()
    with torch.no_grad():
        model.logit_scale.fill_(log)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(scale, rel=1e-5)


def test_a_frozen_tower_keeps_weights_and_statistics_in_training_mode(images):
    model = small_clip(freeze_image=True)
    before = {name: value.clone() for name, value in model.image_tower.state_dict().items()}
    model.train()
    model.encode_image(images).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.image_tower.state_dict().items())
    assert all(p.grad is None for p in model.image_tower.parameters())
    assert model.image_projection.weight.grad is not None and model.text_tower.training


def test_class_features_are_the_normalised_mean_of_the_normalised_sentences():
    model = small_clip()
    sentences = {"a": ["一", "二", "三"], "b": ["four"]}
    bank = bank_of(model, sentences)
    model.eval()
    features = bank.features()
    with torch.no_grad():
        each = [model.encode_text(model.text_tower.tokenize([s])[0])[0] for s in ("一", "二", "三", "four")]
    expected = torch.stack([F.normalize((each[0] + each[1] + each[2]) / 3, dim=0), each[3]])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_a_step_draws_one_sentence_per_class_and_all_get_their_turn():
    model = small_clip().eval()
    bank = bank_of(model, {"a": ["一", "二", "三"], "b": ["four"]})
    with torch.no_grad():
        every = model.encode_text(bank.tokens)
        draws = [model.encode_text(bank.for_step(torch.Generator().manual_seed(i))) for i in range(40)]
    assert {int((every[:3] - draw[0]).norm(dim=1).argmin()) for draw in draws} == {0, 1, 2}
    assert all(torch.allclose(draw[1], every[3], atol=1e-6) for draw in draws)


def test_frozen_text_tower_is_encoded_once_and_gives_the_same_features(monkeypatch):
    trained, frozen = small_clip(), small_clip(freeze_text=True)
    texts = {"a": ["一", "二"], "b": ["four"]}
    bank = bank_of(frozen, texts)
    expected = bank_of(trained.eval(), texts).features()
    monkeypatch.setattr(frozen.text_tower, "forward", lambda **_: pytest.fail("encoded again"))
    torch.testing.assert_close(bank.features(), expected, atol=1e-6, rtol=1e-5)
    frozen.encode_text(bank.for_step(torch.Generator())).sum().backward()
    assert frozen.text_projection.weight.grad is not None


def test_a_step_encodes_each_sentence_once_whatever_the_batch(monkeypatch):
    model = small_clip()
    bank = bank_of(model, {"a": ["一"], "b": ["二"], "c": ["三"]})
    seen = []
    forward = model.text_tower.forward
    monkeypatch.setattr(
        model.text_tower,
        "forward",
        lambda **tokens: seen.append(len(tokens["input_ids"])) or forward(**tokens),
    )
    model.encode_text(bank.for_step(torch.Generator()))
    assert seen == [3]


def test_sentences_that_become_equal_after_cutting_are_refused():
    with pytest.raises(UserError, match="cannot tell"):
        bank_of(small_clip(), {"a": ["肺" * 180 + "一"], "b": ["肺" * 180 + "二"]})


def test_centred_sentences_point_apart_and_only_the_bias_moves():
    model = small_clip()
    texts = {
        "a": ["这是一张正常的胸部X光片"],
        "b": ["这是一张肺炎的胸部X光片"],
        "c": ["这是一张气胸的胸部X光片"],
    }
    for module in model.text_tower.modules():  # as in a published BERT
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    bank = bank_of(model, texts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    together = bank.features() @ bank.features().T
    model.train()  # as a new model is; what is dropped has no part in the mean
    bank.prepare(CPU, center=True)
    apart = bank.features() @ bank.features().T
    off = ~torch.eye(3, dtype=torch.bool)
    assert together[off].min() > 0.9 and apart[off].max() < 0.5
    changed = [name for name, value in model.state_dict().items() if not torch.equal(before[name], value)]
    assert changed == ["text_projection.bias"]
    projected = model.text_projection(model.text_tower(**bank.tokens))
    torch.testing.assert_close(projected.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
