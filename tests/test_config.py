import json
from dataclasses import asdict

import pytest

from common.errors import UserError
from training.config import Config
from training.options import check_options, make_config, options_from_flags, read_config_file, resolve_auto

NEEDED = ["--data-dir", "d", "--output-dir", "o"]


def test_the_guides_defaults():
    config = make_config(options_from_flags(NEEDED))
    expected = {
        "image_encoder_name": "starnet_dual_pyramid_rcf", "text_encoder_name": "bert-base-chinese",
        "embed_dim": 512, "temperature": 0.07, "batch_size": 32, "epochs": 100,
        "learning_rate": 1e-4, "weight_decay": 0.01,
        "img_size": 224, "augmentation": "standard", "num_workers": 4, "gpu_id": 0, "use_amp": True,
        "resume_from": None, "save_best": True, "use_cv": False, "n_splits": 5, "random_state": 42,
        "early_stopping_patience": None, "early_stopping_min_delta": 0.0, "early_stopping_monitor": "val_acc",
        "multi_config": False, "config_file": None, "text_template": None, "class_texts_file": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_flags_that_are_named_unlike_their_key():
    options = options_from_flags(
        ["--image-encoder", "vit", "--text-encoder", "x/y", "--no-amp", "--no-save-best"]
    )
    assert options == {
        "image_encoder_name": "vit",
        "text_encoder_name": "x/y",
        "use_amp": False,
        "save_best": False,
    }


def test_every_mistake_is_reported_at_once_with_the_nearest_name():
    with pytest.raises(UserError) as caught:
        options_from_flags(
            [
                "--epoch",
                "3",
                "--gpu",
                "-1",
                "--批次",
                "--batch-size",
                "0",
                "--learning-rate",
                "fast",
                "--loss",
                "unicle",
            ]
        )
    text = str(caught.value)
    assert "'3'" not in text and " -1" not in text  # values of options that are unknown
    for part in (
        "--epoch (did you mean '--epochs'",
        "unknown option --批次",
        "--batch-size",
        "'fast'",
        "did you mean 'unicl'",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], "--data-dir is required"),
        ([*NEEDED, "--multi-config"], "needs --config-file"),
        ([*NEEDED, "--config-file", "x.json"], "only read with --multi-config"),
        ([*NEEDED, "--resume-from", "x", "--overwrite"], "exclude each other"),
        ([*NEEDED, "--resume-from", "auto", "--overwrite"], "exclude each other"),
        ([*NEEDED, "--groups-file", "x", "--group-pattern", "(a)"], "exclude each other"),
        ([*NEEDED, "--use-cv", "--val-dir", "x"], "exclude each other"),
        ([*NEEDED, "--epochs", "3", "--warmup-epochs", "3"], "less than --epochs"),
        ([*NEEDED, "--loss", "clip", "--logit-adjustment"], "no meaning with --loss clip"),
        ([*NEEDED, "--logit-adjustment-tau", "0.5"], "no effect without --logit-adjustment"),
        (
            [*NEEDED, "--preset", "small-data", "--micro-batch-size", "1"],
            "--cutmix-prob of --preset small-data",
        ),
        ([*NEEDED, "--cutmix-prob", "0.5", "--micro-batch-size", "1"], "give --micro-batch-size 2 or more"),
        ([*NEEDED, "--compile", "--micro-batch-size", "4"], "do not go together"),
        ([*NEEDED, "--preset"], "--preset: expected one argument; --help explains"),
        ([*NEEDED, "--loss", "clip", "--preset", "small-data"], "adjustment of --preset small-data has no"),
        ([*NEEDED, "--fold", "2"], "--fold needs --use-cv"),
        ([*NEEDED, "--use-cv", "--fold", "6"], "between 1 and --n-splits 5"),
    ],
)
def test_contradictions(flags, part):
    with pytest.raises(UserError, match=part):
        make_config(resolve_auto(options_from_flags(flags)))


def test_a_checkpoint_looked_for_contradicts_no_cross_validation():
    with pytest.raises(UserError) as refused:
        make_config(
            resolve_auto(options_from_flags([*NEEDED, "--use-cv", "--overwrite", "--resume-from", "auto"]))
        )
    (problem,) = refused.value.problems
    assert problem.startswith("--resume-from and --overwrite exclude each other")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"epoch": 3}, "unknown key 'epoch' (did you mean 'epochs'"),
        ({"epochs": 3.5}, "must be a whole number"),
        ({"epochs": True}, "must be a whole number, not true"),
        ({"use_amp": "yes"}, "must be true or false"),
        ({"learning_rate": float("nan")}, "must be a number"),
        ({"early_stopping_monitor": "acc"}, "must be one of"),
        ({"image_encoder_name": None}, "must not be null"),
        ({"text_template": " "}, "must be a non-empty text"),
        ({"class_texts_file": "a\0b"}, "must be a non-empty text, not 'a\\x00b'"),
        ({"img_size": 8}, "at least 32"),
    ],
)
def test_json_options_are_checked(options, part):
    (problem,) = check_options(options, "")
    assert part in problem


def test_integers_are_numbers_and_null_patience_means_never():
    assert check_options({"learning_rate": 1, "early_stopping_patience": None}, "") == []


def test_config_file_reports_each_entry_by_number(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"epochs": 1}, {"epochz": 1}, 7, {"name": ""}]), encoding="utf-8-sig")
    with pytest.raises(UserError) as caught:
        read_config_file(path)
    assert [f"entry {n}" in str(caught.value) for n in (1, 2, 3, 4)] == [False, True, True, True]


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        Config().epochs = 3


def test_a_preset_sets_what_is_not_given():
    needed = {"data_dir": "d", "output_dir": "o"}
    plain, preset = make_config(needed), make_config({**needed, "preset": "small-data"})
    changed = {k: v for k, v in asdict(preset).items() if v != asdict(plain)[k]}
    recipe = {"augmentation": "minimal", "logit_adjustment": True, "cutmix_prob": 0.5}
    assert changed == {"preset": "small-data", **recipe}
    assert make_config({**needed, "preset": "small-data", "cutmix_prob": 0.0}).cutmix_prob == 0
    typed = options_from_flags([*NEEDED, "--preset", "small-data", "--cutmix-prob", "1"])
    assert (make_config(typed).cutmix_prob, make_config(typed).logit_adjustment) == (1, True)
    with pytest.raises(UserError, match="small-data"):
        options_from_flags([*NEEDED, "--preset", "smalldata"])
