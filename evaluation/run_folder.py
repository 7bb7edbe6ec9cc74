"""What a run, a cross-validation or an evaluation left in its folder, read back for the report."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import MOST_OF_SPLITS, read_json
from common.run_files import LATEST, fold_dir
from data.findings import LEVELS
from data.scan import nfc
from data.shards import Member, finder
from evaluation.results import Predictions, read_run_predictions

SINGLE, CROSS_VALIDATION, EVALUATION = "single", "cross-validation", "evaluation"


@dataclass(frozen=True)
class RunFolder:
    """kind: SINGLE, CROSS_VALIDATION or EVALUATION (of finished models on another folder).

    histories: fold -> history.json, with 0 for a single run; empty for an evaluation. splits, check:
    splits.json, data_check.json, None where they are not there.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    predictions: Predictions
    histories: Mapping[int, Mapping[str, list[float]]]
    splits: Mapping[str, Any] | None
    check: Mapping[str, Any] | None

    @property
    def images(self) -> str:
        """The folder that the paths of the predictions are relative to, or the shards."""
        return self.config.get("val_dir") or self.config["data_dir"]

    @cached_property
    def image(self) -> Callable[[str], Path | Member]:
        """The file of an image, by its path in the predictions."""
        return finder(self.images, self.config.get("cache_dir"))

    @property
    def by_patient(self) -> bool:
        return bool(self.config.get("group_pattern") or self.config.get("groups_file"))

    @property
    def differing(self) -> list[str]:
        """What an evaluation's models differ in, by the keys of config.json; nothing for other kinds."""
        models = self.config.get("models", [])
        keys = dict.fromkeys(key for model in models for key in model)
        of_each = ("epoch", "epoch_is", "data_dir")  # where images lay says nothing of the model
        return [
            key
            for key in keys
            if key not in of_each and any(model.get(key) != models[0].get(key) for model in models)
        ]

    def models_trained_with(self, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The options of each model, from those of the first (or only) one."""
        return [{**options, **model} for model in self.config.get("models", [{}])]

    def checkpoints(self) -> dict[int, Path]:
        """The file of the model that made the predictions of each fold; 0 where there are no folds."""
        if self.kind == EVALUATION:
            return {0: Path(self.config["checkpoints"][0])}
        if self.kind == SINGLE:
            return {0: self.path / LATEST}
        return {fold: fold_dir(self.path, fold) / LATEST for fold in self.histories}

    def best_epoch(self, fold: int) -> int:
        """The epoch (from 1) that is best by what the run monitored: the first of equals."""
        monitor = self.config.get("early_stopping_monitor", "val_acc")
        values = self.histories[fold][monitor]
        return 1 + values.index(min(values) if monitor == "val_loss" else max(values))

    def counts_per_fold(self) -> list[tuple[Counter[str], Counter[str]]]:
        """Images per class that trained and that validated, of each split; by class folder."""
        folds = self.splits["folds"] if self.splits else []
        return [
            tuple(Counter(nfc(path.split("/")[0]) for path in fold[side]) for side in ("train", "val"))
            for fold in folds
        ]

    def baseline(self) -> tuple[list[str], float]:
        """The classes to answer without looking, of each fold one, and the share of images on which that is
        right.

        It is the most frequent class of the fold's training images; where these are not known, as in an
        evaluation, that of the images themselves. With classes of one size it differs from fold to fold.
        """
        splits = self.counts_per_fold()
        if self.kind == EVALUATION or not splits:
            support = {name: own["support"] for name, own in self.metrics["per_class"].items()}
            splits = [(Counter(support), Counter(support))]
        majority = [max(sorted(train), key=train.__getitem__) for train, _ in splits]
        right = sum(val[name] for name, (_, val) in zip(majority, splits, strict=True))
        return majority, right / sum(val.total() for _, val in splits)


def read_run_folder(path: Path) -> RunFolder:
    """Raises UserError when a file that every finished run has is missing or damaged."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give the folder of a finished run")
    if not (path / "metrics.json").exists():
        raise UserError(f"{path} holds no metrics.json; give the folder of a finished run or evaluation")
    config = read_json(path / "config.json", "the run's config.json")
    summary = read_optional(path / "cv_summary.json")
    if summary:
        folds = {fold["fold"]: fold_dir(path, fold["fold"]) for fold in summary["folds"]}
        kind = CROSS_VALIDATION
    elif "checkpoints" in config:
        folds, kind = {}, EVALUATION
    else:
        folds, kind = {0: path}, SINGLE
    return RunFolder(
        path=path,
        kind=kind,
        config=config,
        metrics=read_json(path / "metrics.json", "the run's metrics.json"),
        predictions=read_run_predictions(path),
        histories={
            fold: read_json(own / "history.json", "the run's history.json") for fold, own in folds.items()
        },
        splits=read_optional(path / "splits.json"),
        check=_read_check(path / "data_check.json"),
    )


def _read_check(path: Path) -> Any:
    """See `read_optional`; it may be of data.check, or written by hand."""
    check = read_optional(path)
    kinds = {"level": str, "message": str, "count": int, "examples": list}
    findings = check.get("findings") if isinstance(check, dict) else None
    well_formed = isinstance(findings, list) and all(
        isinstance(own, dict)
        and all(isinstance(own.get(key), kind) for key, kind in kinds.items())
        and own["level"] in LEVELS
        for own in findings
    )
    if check is not None and not well_formed:
        raise UserError(
            f"{path} holds no findings as the data check writes them; restore it, or remove it, and the "
            "report goes without"
        )
    return check


def which_epoch(model: Mapping[str, Any]) -> str:
    """Of one of an evaluation's "models": whether its epoch was chosen."""
    return {
        "chosen": "an epoch chosen on the validation images of its own training run",
        "last": "the last epoch, not chosen",
        "unfinished": "not chosen, of a training not finished",
        None: "whether its epoch was chosen is not known",  # an evaluation by an earlier version
    }[model.get("epoch_is")]


def weight_for_rare_classes(options: Mapping[str, Any]) -> list[str]:
    """How training gave rare classes weight, in words; empty where it did not."""
    tau = options.get("logit_adjustment_tau", 1.0)
    adjustment = "logit adjustment" if tau == 1 else f"logit adjustment with tau {tau:g}"
    ways = {"use_weighted_sampling": "weighted sampling", "logit_adjustment": adjustment}
    return [words for key, words in ways.items() if options.get(key)]


def loss_words(options: Mapping[str, Any]) -> str:
    """The loss that a model was trained with, and how rare classes were given weight."""
    return ", ".join([options["loss"], *weight_for_rare_classes(options)])


def rates_words(options: Mapping[str, Any]) -> str:
    """The learning rates that a model was trained with."""
    return (
        f"peak learning rate {options['learning_rate']:g} (new layers x {options['new_lr_ratio']:g}, text x "
        f"{options['text_lr_ratio']:g})"
    )


def augmentation_words(options: Mapping[str, Any]) -> str:
    """How the training images were changed."""
    flip = ", mirrored at random" if options["horizontal_flip"] and options["augmentation"] != "none" else ""
    share = options.get("cutmix_prob")
    return f"{options['augmentation']}{flip}{f', CutMix in {share:.0%} of the steps' if share else ''}"


def changed_words(options: Mapping[str, Any]) -> str:
    """Which options were others before a run was resumed; empty where none were, or none are recorded."""
    return "; ".join(options.get("changed_on_resume") or [])


def read_optional(path: Path) -> Any:
    """The JSON there, or None where there is none."""
    return read_json(path, "the run's file", MOST_OF_SPLITS) if path.exists() else None
