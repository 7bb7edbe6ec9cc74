"""CUDA graphs of the image tower. Most of it needs a GPU and skips, saying so, where there is none."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import train
from torch import nn

from common.device import choose_hardware
from data.images import Squares
from data.loader import EpochBatches, ImageDataset, build_loader
from models.image_encoders import ImageTower, build_timm
from models.starnet_dual_pyramid_rcf import starnet_dual_pyramid_rcf
from training.graphs import record_image_tower

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZE = 64


def step(tower: ImageTower, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Features and gradients of one training step, drawn from one and the same random state."""
    torch.cuda.manual_seed(3)
    tower.train().zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        features = tower(images)
    features.float().square().mean().backward()
    return features.detach().float(), [p.grad.clone() for p in tower.parameters()]


@needs_gpu
@pytest.mark.parametrize("encoder", ["resnet18", "starnet_dual_pyramid_rcf"])
def test_a_replayed_step_is_the_step(encoder):
    build = starnet_dual_pyramid_rcf if encoder.startswith("starnet") else lambda *a: build_timm(encoder, *a)
    one_by_one = build("none", SIZE).cuda().to(memory_format=torch.channels_last)
    replaying = copy.deepcopy(one_by_one)
    assert record_image_tower(replaying, [7, 8], SIZE, choose_hardware(0, True)) == ""
    assert len(replaying.recorded) == 2
    random = np.random.default_rng(0)
    for n in (8, 7, 8, 5):  # no passes of 5 were recorded
        images = torch.from_numpy(random.integers(0, 256, (n, 3, SIZE, SIZE), np.uint8)).cuda()
        (ours, own), (theirs, other) = step(replaying, images), step(one_by_one, images)
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        difference = sum((a - b).square().sum() for a, b in zip(own, other, strict=True))
        assert difference.sqrt() < 0.05 * sum(b.square().sum() for b in other).sqrt()
    for ours, theirs in zip(replaying.buffers(), one_by_one.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@needs_gpu
def test_recording_leaves_weights_statistics_and_random_states():
    tower = starnet_dual_pyramid_rcf("none", SIZE).cuda().to(memory_format=torch.channels_last)
    before, state = copy.deepcopy(tower.state_dict()), torch.cuda.get_rng_state()
    assert record_image_tower(tower, [8], SIZE, choose_hardware(0, True)) == ""
    assert torch.equal(state, torch.cuda.get_rng_state())
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in tower.parameters())


class LooksAtTheGpu(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.weight * (2 if images.mean().item() > 0 else 1)


@needs_gpu
def test_what_cannot_be_recorded_goes_on_as_it_is():
    tower = ImageTower(LooksAtTheGpu(), 3, (0.5,) * 3, (0.25,) * 3).cuda()
    assert record_image_tower(tower, [4], SIZE, choose_hardware(0, True))
    assert not tower.recorded
    images = torch.full((4, 3, SIZE, SIZE), 200, dtype=torch.uint8, device="cuda")
    features, gradients = step(tower, images)
    assert features.shape == (4, 3) and gradients[0].isfinite().all()


@needs_gpu
def test_images_that_lie_on_the_gpu_are_those_of_the_memory():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    squares, labels = Squares(pixels, np.array([5, 0, 3, 2])), np.array([0, 1, 1, 0])
    on_gpu, in_memory = (
        ImageDataset([Path("unused")] * 4, labels, 8, squares, torch.device(name)) for name in ("cuda", "cpu")
    )
    batches = EpochBatches(np.arange(4), 3, 1)
    for (ours, *more), (theirs, *same) in zip(
        build_loader(on_gpu, batches, 0), build_loader(in_memory, batches, 0), strict=True
    ):
        assert ours.is_cuda and torch.equal(ours.cpu(), theirs)
        assert all(torch.equal(a, b) for a, b in zip(more, same, strict=True))


def test_a_recorded_batch_size_is_replayed_in_training_alone():
    tower = ImageTower(LooksAtTheGpu(), 3, (0.5,) * 3, (0.25,) * 3)
    tower.recorded[torch.Size((4, 3, 8, 8))] = lambda images: images.new_full((4, 3), 7)
    images = torch.zeros((4, 3, 8, 8), dtype=torch.uint8)
    assert tower.train()(images).eq(7).all()
    assert tower(images[:3]).ne(7).all()
    assert tower.eval()(images).ne(7).all()
    with torch.no_grad():
        assert tower.train()(images).ne(7).all()


def test_without_a_gpu_the_option_says_that_it_changes_nothing(class_folder, tmp_path, capsys, quick_report):
    assert train(class_folder, tmp_path / "run", "--epochs", 1, "--cuda-graphs") == 0
    assert "--cuda-graphs changes nothing here: there is no GPU" in capsys.readouterr().out
