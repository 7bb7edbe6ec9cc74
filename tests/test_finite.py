"""Steps that are not finite are named and skipped, and change nothing; too many in a row end the run."""

from types import SimpleNamespace

import pytest
import torch
from quick import train

import training.one_split as one_split
from common.errors import RunFailed
from evaluation.checkpoints import read_checkpoint
from training.finite import FiniteSteps
from training.fit import stuck_at_chance
from training.losses import contrastive_loss


def bad_at(monkeypatch, numbers):
    count = iter(range(10**6))

    def loss(*given, **named):
        loss, logged = contrastive_loss(*given, **named)
        return (loss * float("nan"), logged) if next(count) in numbers else (loss, logged)

    monkeypatch.setattr(one_split, "contrastive_loss", loss)


@pytest.mark.parametrize(
    ("flags", "bad", "code"),
    [
        ([], {1, 2, 5}, 0),  # two in a row, then one
        ([], {1, 2, 3}, 1),
        (["--max-nonfinite-steps", 1], {1}, 1),
        ([], {3, 4, 5}, 1),  # in a row across the end of an epoch
    ],
)
def test_a_few_are_skipped_and_named_more_in_a_row_end_the_run(
    quick_report, class_folder, tmp_path, monkeypatch, capsys, flags, bad, code
):
    bad_at(monkeypatch, bad)
    assert train(class_folder, tmp_path / "run", "--epochs", 2, *flags) == code
    streams = capsys.readouterr()
    skipped = len(bad) - code
    assert streams.out.count("the step is skipped") == skipped
    assert streams.out.count("not a finite number; the images of that batch:\n") == skipped
    if code:
        assert f"{len(bad)} step" in streams.err and streams.err.count(".png") in (14, 15)
        kept = (tmp_path / "run" / "checkpoint_latest.pth").exists()
        assert kept == (min(bad) == 3)  # the epoch before was saved
    else:
        history = read_checkpoint(tmp_path / "run" / "checkpoint_latest.pth")["history"]
        assert all(torch.isfinite(torch.tensor(values)).all() for values in history.values())


def test_a_skipped_step_leaves_weights_moments_and_statistics_as_they_were():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, nonfinite_steps=0)
    state.statistics = lambda: [model[1].running_mean, model[1].running_var]
    watch = FiniteSteps(state, [f"image {i}" for i in range(9)], 3)

    def step(images, indices):
        loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        finite = torch.isfinite(loss.detach())
        optimizer.found_inf = (~finite).float()  # as in a training step
        watch.note(finite, torch.tensor(indices))
        optimizer.step()
        watch.check()

    step(torch.randn(5, 3), [0])
    before = [
        value.clone()
        for value in (
            *model.state_dict().values(),
            *(v for s in optimizer.state.values() for v in s.values()),
        )
        if value.is_floating_point()
    ]
    for times in (1, 2):
        step(torch.full((5, 3), float("inf")), [1, 2])
        assert state.nonfinite_steps == times
    after = [
        value
        for value in (
            *model.state_dict().values(),
            *(v for s in optimizer.state.values() for v in s.values()),
        )
        if value.is_floating_point()
    ]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    step(torch.randn(5, 3), [0])
    assert state.nonfinite_steps == 0
    assert not torch.equal(before[0], model[0].weight)
    for _ in range(2):
        step(torch.full((5, 3), float("nan")), [3])
    with pytest.raises(RunFailed, match="image 3"):
        step(torch.full((5, 3), float("nan")), [3 + 2 * 9])  # shown for the third time


def test_in_float16_a_gradient_that_no_scale_makes_finite_ends_the_run():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = SimpleNamespace(model=model, optimizer=optimizer, scaler=scaler, nonfinite_steps=0)
    state.statistics = lambda: []
    watch = FiniteSteps(state, ["image"], 3)

    def step():
        scaler.scale((model(torch.ones(1, 3)) * 1e30).square().sum() * 0).backward()
        for parameter in model.parameters():
            parameter.grad.fill_(float("inf"))
        scaler.unscale_(optimizer)
        watch.note(torch.tensor(True), torch.tensor([0]))  # the loss is finite
        scaler.step(optimizer)
        scaler.update()
        watch.check()

    step()
    step()
    with pytest.raises(RunFailed, match="float16"):
        step()


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([1.2, 1.11, 1.1, 1.1, 1.1, 1.1, 1.1], 6),  # not while it falls, and once
        ([1.1, 1.1, 1.1, 1.1, 1.0, 1.1, 1.1, 1.1, 1.1], None),
        ([1.1, 1.0, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1], 7),
        ([1.1, 1.08, 1.078, 1.0, 0.9], None),
        ([4.0, 3.0, 2.2, 1.6, 1.2, 1.1], None),  # still above chance, and learning
    ],
)
def test_the_hint_comes_once_when_the_loss_has_not_left_chance(losses, at):
    chance = 1.0986  # ln 3
    said = [n for n in range(1, len(losses) + 1) if stuck_at_chance(losses[:n], chance)]
    assert said == ([at] if at else [])


def test_a_run_that_cannot_learn_says_so(quick_report, class_folder, tmp_path, capsys):
    flags = ["--epochs", 6, "--learning-rate", 1e-9, "--temperature", 1.0, "--freeze-image-encoder"]
    assert train(class_folder, tmp_path / "run", *flags) == 0
    assert capsys.readouterr().out.count("hint: for 5 epochs the loss has stayed") == 1
