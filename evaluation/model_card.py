"""The model card (README.md) of an exported model: what it is for and not for, data, metrics, limits.

Mitchell et al. 2019, "Model Cards for Model Reporting", arXiv 1810.03993. The header is Hugging Face's. The
text is in model_card.md.jinja.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from common.files import printable
from common.run_files import fold_number
from data.scan import nfc
from evaluation.report_tables import plain
from evaluation.run_folder import loss_words, read_optional, weight_for_rare_classes
from evaluation.tables import OVERALL, why_missing, with_interval
from evaluation.trained import TrainedModel


def run_facts(trained: TrainedModel) -> dict[str, Any]:
    """What the checkpoint, and the run's own files where they lie beside it, say of the run.

    fold: its number in a cross-validation, or None. epoch_is: of `TrainedModel.facts`. val: the validation
    figures of the checkpoint's epoch. started: from which weights the image encoder did.
    val_dir, by_patient: were the validation images a folder of their own, and did an option name patients.
    record, split: config.json, the fold in splits.json; None where they are not known. apart: how that set
    the validation images apart. metrics: metrics.json; None also where it is of another epoch.
    """
    folder = trained.path.resolve().parent
    number = fold_number(folder)
    in_fold = number is not None and (folder.parent / "config.json").exists()
    run, fold = (folder.parent, number) if in_fold else (folder, None)
    history, epoch, config = (trained.facts[key] for key in ("history", "epoch", "config"))
    loaded, source = trained.facts["pretrained"]["image"], config["image_weights"]
    whole = len(loaded) >= len(list(trained.model.image_tower.parameters()))
    weights = "published weights" if source in ("auto", "pretrained") else "weights of a file"
    facts: dict[str, Any] = {
        "fold": fold,
        "epoch_is": trained.facts["epoch_is"],
        "val": {key: values[epoch - 1] for key, values in history.items() if key.startswith("val_")},
        "started": f"{'' if whole else 'in part '}from {weights}" if loaded else "from random weights",
        "val_dir": bool(config.get("val_dir")),
        "by_patient": bool(config.get("group_pattern") or config.get("groups_file")),
    }
    record, splits, metrics = (
        read_optional(run / f"{name}.json") for name in ("config", "splits", "metrics")
    )
    if not record or record.get("dataset_fingerprint") != trained.facts["dataset_fingerprint"]:
        record = splits = metrics = None  # the checkpoint was moved here from elsewhere
    facts |= {
        "record": record,
        "metrics": metrics if facts["epoch_is"] == "last" else None,
        "split": None,
        "apart": "in a way not known",
    }
    if splits:
        facts["split"] = splits["folds"][(fold or 1) - 1]
        ways = ["as a folder of their own"] if facts["val_dir"] else []
        if facts["by_patient"]:
            ways.append(f"by patient (none of the {splits['n_groups']} is on both sides)")
        facts["apart"] = ", ".join(ways) or "by image"
    return facts


def model_card(
    about: Mapping[str, Any], run: Mapping[str, Any], files: Sequence[str], difference: float | None
) -> str:
    """Markdown with a YAML header. about: `evaluation.export.description`; run: `run_facts`; files: names of
    the exported files; difference: of the ONNX file's answers from PyTorch's, None without one.
    """
    split = run["split"] or {"train": (), "val": ()}
    train, val = (Counter(nfc(path.split("/")[0]) for path in split[side]) for side in ("train", "val"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "interval": with_interval, "plain": plain}
    metrics = run["metrics"] or {"per_class": {}}
    shown = [metrics[key] for key in OVERALL if key in metrics]
    of_class = ("sensitivity", "specificity", "roc_auc")
    shown += [own[key] for own in metrics["per_class"].values() for key in of_class]
    text = environment.get_template("model_card.md.jinja").render(
        about=about,
        run=run,
        files=[*files, "README.md"],
        difference=difference,
        overall=OVERALL,
        missing=why_missing(shown)[0],
        loss=loss_words(about["training_options"]),
        evened=weight_for_rare_classes(about["training_options"]),
        counts={name: (train[name] + val[name], train[name], val[name]) for name in about["classes"]},
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _cell(text: str) -> str:
    """Text that stays one cell of a Markdown table, whatever it holds."""
    return " ".join(re.sub(r"([\\|`*_<>\[\]])", r"\\\1", printable(text)).split())
