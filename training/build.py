"""Build what a run trains, as its options say: the two towers, the sentences, the optimizer."""

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.device import Hardware
from common.distributed import n_processes
from common.errors import all_of
from data.groups import patient_pattern
from data.texts import check_template, read_texts
from models.clip import ClassSentences, CLIPModel, build_clip, check_image_encoder
from models.sync_batchnorm import synchronise_batchnorm
from models.text_encoders import check_text_encoder, trained_rows
from training.config import Config
from training.optim import parameter_groups, warmup_steps
from training.state import EarlyStopping, TrainState


def refuse_unfit(config: Config) -> None:
    """Raises UserError naming each encoder, size, template, sentence and pattern that cannot be used."""
    checks = [
        partial(check_image_encoder, config.image_encoder_name, config.img_size),
        partial(check_text_encoder, config.text_encoder_name),
    ]
    if config.text_template:
        checks.append(partial(check_template, config.text_template))
    if config.class_texts_file and os.path.isfile(config.class_texts_file):  # a pipe can be read only once
        checks.append(partial(read_texts, Path(config.class_texts_file)))
    if config.group_pattern:
        checks.append(partial(patient_pattern, config.group_pattern))
    all_of(*checks)


def build_model(config: Config, hardware: Hardware, checkpoint: Mapping[str, Any] | None = None) -> CLIPModel:
    """Both towers, seeded. Where a checkpoint will fill them, published weights are not fetched again."""
    torch.manual_seed(config.random_state)
    model = build_clip(
        config.image_encoder_name,
        config.text_encoder_name,
        img_size=config.img_size,
        embed_dim=config.embed_dim,
        temperature=config.temperature,
        image_weights="none" if checkpoint else config.image_weights,
        text_weights="none" if checkpoint else config.text_weights,
        freeze_image=config.freeze_image_encoder,
        freeze_text=config.freeze_text_encoder,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    if config.sync_batchnorm and n_processes() > 1:
        synchronise_batchnorm(model, on_gpu=hardware.device.type == "cuda")
    if checkpoint:
        model.image_tower.pretrained = frozenset(checkpoint["pretrained"]["image"])
        model.text_tower.pretrained = frozenset(checkpoint["pretrained"]["text"])
    names = {"image": config.image_encoder_name, "text": config.text_encoder_name}
    for side, tower in (("image", model.image_tower), ("text", model.text_tower)):
        millions = sum(p.numel() for p in tower.parameters()) / 1e6
        share = len(tower.pretrained) / sum(1 for _ in tower.parameters())
        source = getattr(config, f"{side}_weights")
        source = "published weights" if source in ("auto", "pretrained") else source
        origin = "random weights" if share == 0 else f"{100 * share:.0f} % of its tensors from {source}"
        frozen = ", frozen" if tower in model.frozen else ""
        print(f"{side} encoder: {names[side]}, {millions:.1f} M parameters, {origin}{frozen}")
        if frozen and side == "image" and share == 0 and not checkpoint:
            print("warning: a frozen image encoder with random weights learns nothing about images")
    return model


def compile_image_tower(model: CLIPModel, config: Config, batch_size: int, hardware: Hardware) -> None:
    """For training with batches of so many images; says how long it took, or why it could not be done."""
    if model.image_tower in model.frozen:
        print("note: --compile changes nothing: the image encoder is frozen")
        return
    if model.image_tower.compiled is not None:
        return  # it was tried for the fold before
    print("compiling the image encoder's training passes; this takes minutes, in silence", flush=True)
    started = time.monotonic()
    shape = (batch_size, 3, config.img_size, config.img_size)
    images = torch.zeros(shape, dtype=torch.uint8, device=hardware.device)
    failure = model.image_tower.compile_training(images, hardware.autocast())
    if failure:
        print(f"warning: torch.compile cannot ({failure}); training goes on without it")
    else:
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)


def n_parameters(model: CLIPModel) -> int:
    rows = trained_rows(model)
    twice = rows.rows.numel() if rows else 0  # by itself, and in its table
    return sum(p.numel() for p in model.parameters()) - twice


def tokenise(model: CLIPModel, texts: Mapping[str, Sequence[str]]) -> ClassSentences:
    sentences = ClassSentences(model, texts)
    for note in sentences.notes:
        print(f"note: {note}")
    return sentences


def build_state(config: Config, hardware: Hardware, model: CLIPModel, steps_per_epoch: int) -> TrainState:
    """What a run begins with: `model`, moved to its device, and its optimizer."""
    model.to(hardware.device, memory_format=torch.channels_last)
    return TrainState(
        model=model,
        optimizer=torch.optim.AdamW(
            parameter_groups(
                model,
                learning_rate=config.learning_rate,
                new_lr_ratio=config.new_lr_ratio,
                text_lr_ratio=config.text_lr_ratio,
                weight_decay=config.weight_decay,
            ),
            fused=True,
        ),
        scaler=torch.amp.GradScaler(hardware.device.type, enabled=hardware.dtype == torch.float16),
        early_stopping=EarlyStopping(
            config.early_stopping_monitor, config.early_stopping_patience, config.early_stopping_min_delta
        ),
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=warmup_steps(config.warmup_epochs, config.epochs, steps_per_epoch),
    )
