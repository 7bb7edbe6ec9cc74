"""Models as runs left them: checkpoints found, read, and made ready to use."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.device import choose_hardware
from common.errors import UserError, first_line, number
from common.run_files import BEST, LATEST, PREVIOUS, find_checkpoints
from evaluation.checkpoints import NOT_FOR_USE, read_checkpoint, used_up
from models.clip import ClassSentences, CLIPModel, build_clip


@dataclass(frozen=True)
class TrainedModel:
    """One checkpoint, ready for images.

    model: in evaluation mode on `device`; its text tower is None unless asked for. class_features (C, D): of
    unit length, on `device`. facts: the checkpoint without its weights (config, history, epoch, best, ...),
    and "epoch_is": "chosen" as the best by its validation images, "last", or "unfinished": of a training that
    was to go on. autocast: the precision to use it in; float32, but where `load_models` chose it.
    """

    path: Path
    model: CLIPModel
    device: torch.device
    classes: tuple[str, ...]
    class_texts: dict[str, list[str]]
    class_features: torch.Tensor
    img_size: int
    facts: dict[str, Any]
    autocast: torch.autocast = field(default_factory=partial(torch.autocast, "cpu", enabled=False))

    @property
    def folders(self) -> set[Path]:
        """Where its images of training and validation lay; of an address of shards no folder that exists."""
        config = self.facts["config"]
        return {Path(os.path.realpath(config[n])) for n in ("data_dir", "val_dir") if config.get(n)}

    def features_of(self, texts: Mapping[str, Sequence[str]]) -> tuple[torch.Tensor, list[str]]:
        """(C, D) for other sentences, class name -> sentences, and what the user should know of these; needs
        the text tower.
        """
        sentences = ClassSentences(self.model, texts)
        sentences.prepare(self.device, center=False)
        return sentences.features(), sentences.notes


def load_trained(path: Path, device: torch.device, *, with_text: bool = False) -> TrainedModel:
    """The model of one checkpoint file. Its text tower is built only `with_text`, for new sentences."""
    others = [path.with_name(name) for name in (BEST, LATEST, PREVIOUS) if name != path.name]
    beside = "".join([f", such as {file}, which is beside it" for file in others if file.is_file()][:1])
    checkpoint = read_checkpoint(path, "--checkpoint", f"give another one{beside}", with_text=with_text)
    begun = checkpoint.get("in_epoch", {}).get("steps", 0)
    if begun or not checkpoint["epoch"]:
        best = path.with_name(BEST)
        instead = f", or give {best}" if best.is_file() else ""
        raise UserError(
            f"--checkpoint {path} was saved in the middle of epoch {checkpoint['epoch'] + 1} (after {begun} "
            f"steps), so nothing is known of how good it is; continue the run to the epoch's end{instead}"
        )
    config = checkpoint["config"]
    model = build_clip(
        config["image_encoder_name"],
        config["text_encoder_name"] if with_text else None,
        img_size=config["img_size"],
        embed_dim=config["embed_dim"],
        temperature=config["temperature"],
        image_weights="none",
        text_weights="none",
    )
    state = checkpoint["model"]
    if not with_text:
        state = {name: value for name, value in state.items() if not name.startswith("text_")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"--checkpoint {path} does not fit its own model: {first_line(error)}") from None
    model.to(device, memory_format=torch.channels_last).eval()
    return TrainedModel(
        path=path,
        model=model,
        device=device,
        classes=tuple(checkpoint["classes"]),
        class_texts=checkpoint["class_texts"],
        class_features=checkpoint["class_features"].to(device),
        img_size=config["img_size"],
        facts={key: checkpoint[key] for key in checkpoint.keys() - {"model", *NOT_FOR_USE}}
        | {"epoch_is": _which_epoch(checkpoint)},
    )


def _which_epoch(checkpoint: Mapping[str, Any]) -> str:
    if "optimizer" not in checkpoint:  # as in every best epoch's file, whatever it is called
        return "chosen"
    config = checkpoint["config"]
    without = checkpoint.get("early_stopping", {}).get("epochs_without", 0)
    stopped_early = used_up(config.get("early_stopping_patience"), without)
    return "last" if stopped_early or checkpoint["epoch"] == config.get("epochs") else "unfinished"


def load_models(
    checkpoints: Sequence[Path], gpu_id: int, use_amp: bool, texts: Mapping[str, Sequence[str]] | None = None
) -> list[TrainedModel]:
    """The models `checkpoints` stand for, each in the precision it was validated in, float32 unless
    `use_amp`. With `texts` (class -> sentences) their classes are these. What they are is printed.
    """
    found = [file for path in checkpoints for file in find_checkpoints(path)]
    files = list({file.resolve(): file for file in found}.values())
    if len(files) < len(found):
        twice = number(len(found) - len(files), "checkpoint is", "checkpoints are")
        print(f"note: {twice} given twice and counted once")
    models, told = [], set()
    for file in files:
        trained = load_trained(file, choose_hardware(gpu_id, False).device, with_text=texts is not None)
        config = trained.facts["config"]
        hardware = choose_hardware(gpu_id, config["use_amp"] and use_amp)
        if hardware.description not in told:
            print(f"device: {hardware.description}")
            told.add(hardware.description)
        trained = dataclasses.replace(trained, autocast=hardware.autocast())
        if texts is not None:
            with trained.autocast:
                features, notes = trained.features_of(texts)
            for note in () if models else notes:
                print(f"note: {note}")
            trained.model.text_tower = None  # it has done its work
            trained = dataclasses.replace(trained, classes=tuple(texts), class_features=features)
        epoch = f"epoch {trained.facts['epoch']}"
        print(f"model: {file}, {config['image_encoder_name']}, {trained.img_size} px, {epoch}")
        models.append(trained)
    return models
