"""Every option that is meant to change training does: the run ends with other weights than without it."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from quick import QUICK
from safetensors.torch import save_file

from evaluation.checkpoints import read_checkpoint
from models.text_encoders import build_text_tower
from train_clip import main
from training.config import FIELDS, flag_of

# A new option joins one of the two tables: with its value (none of a switch) and the flags that it needs, or
# with why it is not here.
CHANGES = {
    "val_ratio": ["0.4"],
    "group_pattern": ["^(..)"],
    "groups_file": ["ROOT/groups.csv"],
    "text_template": ["an image of {class_name}"],
    "class_texts_file": ["ROOT/texts.json"],
    "image_encoder_name": ["timm:test_vit"],
    "image_weights": ["ROOT/image.safetensors"],
    "text_weights": ["ROOT/text.safetensors"],
    "embed_dim": ["8"],
    "temperature": ["0.5"],
    "freeze_image_encoder": [],
    "freeze_text_encoder": [],
    "preset": ["small-data"],
    "batch_size": ["8"],
    "micro_batch_size": ["2", "--batch-size", "8"],
    "epochs": ["2"],
    "learning_rate": ["1e-3"],
    "new_lr_ratio": ["3"],
    "text_lr_ratio": ["1"],
    "weight_decay": ["0.5"],
    "warmup_epochs": ["0.5"],
    "grad_clip": ["0.01"],
    "loss": ["ce"],
    "use_weighted_sampling": [],
    "logit_adjustment": [],
    "logit_adjustment_tau": ["0.5", "--logit-adjustment"],
    "img_size": ["64"],
    "augmentation": ["minimal"],
    "horizontal_flip": [],
    "cutmix_prob": ["1"],
    "use_amp": [],
    "random_state": ["43"],
    "early_stopping_monitor": ["val_loss"],
}
NOT_HERE = {
    "val_dir": "test_training looks at the split",
    "skip_unreadable": "test_cli looks at what is left out",
    "text_encoder_name": "of those that need no download there is one",
    "gradient_checkpointing": "the same numbers, in less memory: below",
    "sync_batchnorm": "needs several processes: test_distributed",
    "save_best": "test_training looks for the file",
    "use_cv": "test_cross_validation",
    "n_splits": "test_cross_validation",
    "early_stopping_patience": "test_training counts the epochs",
    "early_stopping_min_delta": "test_training counts the epochs",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images of two classes, four and eight of them, two of each patient; and files for options to name."""
    root, random = tmp_path_factory.mktemp("options"), np.random.RandomState(0)
    groups = ["path,group"]
    for name, count in (("a", 4), ("b", 8)):
        (root / "data" / name).mkdir(parents=True)
        for i in range(count):
            path = f"{name}/{name}{i // 2}_{i}.png"
            Image.fromarray(random.randint(0, 256, (32, 32), np.uint8)).save(root / "data" / path)
            groups.append(f"{path},{name}{i // 2}")
    (root / "groups.csv").write_text("\n".join(groups))
    (root / "texts.json").write_text('{"a": "one thing", "b": ["another", "something else"]}')
    torch.manual_seed(7)
    save_file(timm.create_model("test_resnet").state_dict(), root / "image.safetensors")
    save_file(build_text_tower("bert-tiny-bytes", "none").encoder.state_dict(), root / "text.safetensors")
    return root


@pytest.fixture(scope="module")
def after(quick_report, root):
    """What the checkpoint holds of the model after a short training with these flags, each trained once."""
    runs = {}

    def train(*flags):
        if flags not in runs:
            output = root / f"run {len(runs)}"
            given = ["--data-dir", str(root / "data"), "--output-dir", str(output)]
            given += [flag for flag in QUICK if flag != "--no-amp"]
            given += ["--image-encoder", "timm:test_resnet", "--batch-size", "4", "--epochs", "1"]
            given += ["--no-cache", "--no-save-best"]
            assert main([*given, *flags]) == 0
            checkpoint = read_checkpoint(output / "checkpoint_latest.pth")
            runs[flags] = checkpoint["model"], checkpoint["best"]
        return runs[flags]

    return train


@pytest.fixture(autouse=True)
def cpu_with_bf16(monkeypatch):
    """So that mixed precision is not float32 on any machine."""
    monkeypatch.setattr("common.device._cpu_has_bf16", lambda: True)


def same(one, other) -> bool:
    (weights, best), (other_weights, other_best) = one, other
    return (
        best == other_best
        and weights.keys() == other_weights.keys()
        and all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    )


def test_every_option_is_in_one_of_the_tables():
    of_training = {name for name, field in FIELDS.items() if field.metadata["on_resume"] != "free"}
    assert CHANGES.keys() | NOT_HERE.keys() == of_training and not CHANGES.keys() & NOT_HERE.keys()


def test_without_an_option_training_is_the_same_once_more(after):
    """Else what follows would say nothing."""
    torch.manual_seed(1)
    assert same(after(), after("--num-workers", "0"))


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_changes_the_training(name, root, after):
    n_values = FIELDS[name].type not in ("bool", bool)
    values, needs = CHANGES[name][:n_values], CHANGES[name][n_values:]
    values = [value.replace("ROOT", str(root)) for value in values]
    assert not same(after(flag_of(name), *values, *needs), after(*needs))


def test_gradient_checkpointing_reaches_the_encoders(root, tmp_path, capsys):
    """One that has no form of it is refused."""
    flags = ["--data-dir", str(root / "data"), "--output-dir", str(tmp_path / "run"), *QUICK]
    flags += ["--image-encoder", "timm:dla46_c"]
    assert main([*flags, "--gradient-checkpointing"]) == 2
    assert "timm:dla46_c" in capsys.readouterr().err
