"""Every option once: name, type, default, range, help. The flags, the JSON keys and config.json come from
here; training/options.py reads and checks what is given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MONITORS = ("val_acc", "val_loss", "val_balanced_acc", "val_macro_f1")
# What did better than the defaults on 1,124 real films, trained from scratch (benchmarks/RESULTS.md).
PRESETS = {"small-data": {"augmentation": "minimal", "logit_adjustment": True, "cutmix_prob": 0.5}}


def option(
    default: Any,
    group: str,
    help: str,
    *,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    on_resume: str = "said",
) -> Any:
    """A field of Config. `low`/`high` are inclusive bounds, `above`/`below` exclusive ones.

    `on_resume` says whether it may change when a run is continued. "fixed": no. "same": only where the split
    and the sentences stay what they were. "said": with --resume-from, which then says so; a cross-validation
    and the entries of a --config-file are refused. "free": always.
    """
    return field(
        default=default, metadata={key: value for key, value in locals().items() if key != "default"}
    )


@dataclass(frozen=True)
class Config:
    """All options of a run. Field names are the JSON keys of the guide."""

    data_dir: str | None = option(
        None,
        "data",
        "folder with one sub-folder of images per class, or tar shards (required)",
        on_resume="free",
    )
    output_dir: str | None = option(
        None, "data", "folder for everything the run writes (required)", on_resume="free"
    )
    val_dir: str | None = option(
        None, "data", "a ready validation folder (or shards), instead of holding images out", on_resume="same"
    )
    val_ratio: float = option(
        0.2, "data", "share of images held out for validation", above=0, high=0.5, on_resume="same"
    )
    group_pattern: str | None = option(
        None, "data", "regular expression on the file name whose first group is the patient", on_resume="same"
    )
    groups_file: str | None = option(
        None, "data", "CSV with columns path,group that names each image's patient", on_resume="same"
    )
    cache_dir: str | None = option(
        None, "data", "folder for decoded images (default: ~/.cache/train_clip)", on_resume="free"
    )
    use_cache: bool = option(
        True, "data", "keep no decoded images on disk", flag="--no-cache", on_resume="free"
    )
    skip_unreadable: bool = option(False, "data", "leave unreadable images out instead of stopping")
    overwrite: bool = option(False, "data", "replace another run's results in --output-dir", on_resume="free")

    text_template: str | None = option(
        None,
        "text",
        'sentence for every class, such as "这是一张{class_name}的图片" (default: the class name)',
        on_resume="same",
    )
    class_texts_file: str | None = option(
        None, "text", "JSON file: class name -> one sentence or a list of sentences", on_resume="same"
    )

    image_encoder_name: str = option(
        "starnet_dual_pyramid_rcf",
        "model",
        "image encoder, or timm:NAME for any timm model",
        flag="--image-encoder",
        on_resume="fixed",
    )
    text_encoder_name: str = option(
        "bert-base-chinese",
        "model",
        "text encoder: bert-base-chinese, bert-tiny-bytes (no download), a Hugging Face id or a local folder",
        flag="--text-encoder",
        on_resume="fixed",
    )
    image_weights: str = option(
        "auto",
        "model",
        "pretrained, none (random), or a file or folder; auto: none for starnet_dual_pyramid_rcf, else "
        "pretrained",
        on_resume="fixed",
    )
    text_weights: str = option(
        "auto",
        "model",
        "pretrained, none (random), or a file or folder; auto: none for bert-tiny-bytes, else pretrained",
        on_resume="fixed",
    )
    embed_dim: int = option(
        512, "model", "size of the shared embedding space", low=2, high=8192, on_resume="fixed"
    )
    temperature: float = option(
        0.07,
        "model",
        "temperature at the start; learned afterwards",
        low=0.01,
        high=1.0,
        on_resume="fixed",
    )
    freeze_image_encoder: bool = option(
        False, "model", "keep the image tower as it is; train its projection", on_resume="fixed"
    )
    freeze_text_encoder: bool = option(
        False,
        "model",
        "keep the text tower as it is; its sentences are then encoded once per run",
        on_resume="fixed",
    )

    preset: str | None = option(
        None,
        "training",
        "small-data: --augmentation minimal --logit-adjustment --cutmix-prob 0.5; options that are given "
        "as well win",
        choices=tuple(PRESETS),
        on_resume="fixed",
    )
    batch_size: int = option(32, "training", "images per step, over all processes", low=2)
    micro_batch_size: int | None = option(
        None,
        "training",
        "images whose activations are held at once, on each process; loss and gradients stay those of the "
        "whole batch, though CutMix pairs within these (default: all)",
        low=1,
    )
    gradient_checkpointing: bool = option(
        False, "training", "compute activations twice instead of holding them: a third more time, less memory"
    )
    sync_batchnorm: bool = option(
        False, "training", "with torchrun: BatchNorm over the images of all processes, not of each by itself"
    )
    epochs: int = option(100, "training", "passes over the training images", low=1)
    learning_rate: float = option(
        1e-4, "training", "peak learning rate of a pretrained image tower", above=0, high=1
    )
    new_lr_ratio: float = option(
        10.0,
        "training",
        "times --learning-rate: projections, scale, image layers without pretrained weights",
        above=0,
    )
    text_lr_ratio: float = option(0.2, "training", "times --learning-rate: the text tower", above=0)
    weight_decay: float = option(0.01, "training", "AdamW's decay of weight matrices", low=0, below=1)
    warmup_epochs: float | None = option(
        None, "training", "epochs of linear warm-up (default: 5 %% of --epochs)", low=0
    )
    grad_clip: float = option(
        1.0, "training", "largest norm of a step's gradient; 0 switches clipping off", low=0
    )
    max_nonfinite_steps: int = option(
        3,
        "training",
        "stop after this many steps in a row whose loss or gradient is not finite; fewer are skipped",
        low=1,
        on_resume="free",
    )
    loss: str = option(
        "unicl",
        "training",
        "unicl: class-aware, both directions; clip: in-batch pairs; ce: image to text only",
        choices=("unicl", "clip", "ce"),
    )
    use_weighted_sampling: bool = option(
        False,
        "training",
        "show every class equally often: rare images several times an epoch, frequent ones not in each",
    )
    logit_adjustment: bool = option(
        False,
        "training",
        "correct the loss for the classes' frequencies, so that rare classes are found too",
    )
    logit_adjustment_tau: float = option(
        1.0,
        "training",
        "how far --logit-adjustment goes: 1 as if all classes were equally frequent, 0.5 half of the way, so "
        "that fewer images are taken for a rare class",
        above=0,
        high=5,
    )
    img_size: int = option(224, "training", "image side in pixels", low=32, high=4096, on_resume="fixed")
    augmentation: str = option(
        "standard", "training", "training augmentation", choices=("none", "minimal", "standard")
    )
    horizontal_flip: bool = option(
        True, "training", "no mirrored images (a mirror swaps left and right)", flag="--no-horizontal-flip"
    )
    cutmix_prob: float = option(
        0.0,
        "training",
        "in such a share of the steps each image gets a box of another one, and both their classes",
        low=0,
        high=1,
    )

    compile: bool = option(
        False,
        "other",
        "let torch.compile make kernels for the image tower: minutes at the start; may make steps faster; "
        "for one process and whole batches",
        on_resume="free",
    )
    num_workers: int = option(
        4,
        "other",
        "processes that read images which neither the cache nor memory holds, at most one per CPU core",
        low=0,
        high=256,
        on_resume="free",
    )
    gpu_id: int = option(0, "other", "CUDA device; -1 trains on the CPU", low=-1, on_resume="free")
    use_amp: bool = option(True, "other", "train in float32 instead of mixed precision", flag="--no-amp")
    resume_from: str | None = option(
        None,
        "other",
        "checkpoint to continue from, or its run's folder; auto: the one in --output-dir, where there is one",
        on_resume="free",
    )
    save_every_minutes: float = option(
        10.0,
        "other",
        "save within an epoch too, this often; 0 saves at the ends of epochs only",
        low=0,
        on_resume="free",
    )
    save_best: bool = option(True, "other", "do not write checkpoint_best.pth", flag="--no-save-best")

    use_cv: bool = option(False, "cross-validation", "k-fold cross-validation", on_resume="fixed")
    n_splits: int = option(5, "cross-validation", "number of folds", low=2, on_resume="fixed")
    fold: int | None = option(
        None,
        "cross-validation",
        "train this fold alone (1 to --n-splits), as one of several jobs",
        low=1,
        on_resume="free",
    )
    random_state: int = option(
        42, "cross-validation", "seed of splits, weights and order", low=0, high=2**31 - 1, on_resume="fixed"
    )

    early_stopping_patience: int | None = option(
        None, "early stopping", "stop after this many epochs without improvement (default: never)", low=1
    )
    early_stopping_min_delta: float = option(
        0.0,
        "early stopping",
        "smallest change that counts: percentage points for accuracies and F1, absolute for loss",
        low=0,
    )
    early_stopping_monitor: str = option(
        "val_acc",
        "early stopping",
        "what early stopping and checkpoint_best.pth go by",
        choices=MONITORS,
        on_resume="fixed",
    )

    multi_config: bool = option(
        False, "several configurations", "train every entry of --config-file", on_resume="free"
    )
    config_file: str | None = option(
        None, "several configurations", "JSON array of configurations", on_resume="free"
    )
    config_index: int | None = option(
        None,
        "several configurations",
        "train this entry alone (1 is the first), as one of several jobs",
        low=1,
        on_resume="free",
    )


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag_of(name: str) -> str:
    return FIELDS[name].metadata["flag"] or "--" + name.replace("_", "-")


def value_of(name: str, value: Any) -> Any:
    """An option's value, as a message says it after the flag: `--no-amp False` would say the opposite."""
    if value is None or isinstance(value, bool):
        return "not given" if value == FIELDS[name].default else "given"
    return value


def shown(name: str, value: Any) -> str:
    return f"{flag_of(name)} {value_of(name, value)}"


def as_typed(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(name) if value != FIELDS[name].default else f"without {flag_of(name)}"
    return f"{flag_of(name)} {value}"


def named(name: str, config: Config) -> str:
    """An option as it is typed, with the preset it comes from, where it comes from one."""
    by_it = PRESETS.get(config.preset, {}).get(name)
    return flag_of(name) + (f" of --preset {config.preset}" if by_it == getattr(config, name) else "")


def of_preset(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the preset in `options` sets, where they name one; they themselves win over it."""
    return PRESETS.get(options.get("preset"), {})
