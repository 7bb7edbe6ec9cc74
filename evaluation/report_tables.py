"""The tables of the report, from what a run folder holds. Plain text: the template escapes it."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from common.errors import number
from evaluation.run_folder import (
    CROSS_VALIDATION,
    EVALUATION,
    SINGLE,
    RunFolder,
    augmentation_words,
    changed_words,
    loss_words,
    rates_words,
    weight_for_rare_classes,
    which_epoch,
)
from evaluation.tables import OVERALL, PER_CLASS, rounded, value_and_interval

Table = dict[str, Sequence[Any]]  # "header" (may be empty) and "rows"
_HISTORY = {
    "train_loss": "Training loss, as minimised",
    "train_loss_image_to_text": "Training loss, image to text",
    "val_loss": "Validation loss, image to text",
    "train_acc": "Training accuracy (%)",
    "val_acc": "Validation accuracy (%)",
    "val_balanced_acc": "Validation balanced accuracy (%)",
    "val_macro_f1": "Validation macro-F1 (%)",
}


def measures(run: RunFolder) -> Table:
    rows = []
    for key, title in OVERALL.items():
        value, interval = value_and_interval(run.metrics[key], title)
        rows.append([title.replace(" (%)", ""), value, interval, run.metrics[key]["method"] or ""])
    return {"header": ["Measure 指标", "Value 值", "95 % interval 区间", "Method 方法"], "rows": rows}


def images_table(run: RunFolder) -> tuple[Table, str]:
    """Images and patients per class and side of the split, and what to know of the sums."""
    p, splits = run.predictions, run.counts_per_fold()
    header = ["Class 类别"]
    columns: list[list[Any]] = []
    if run.kind != EVALUATION and splits:
        if run.kind == SINGLE:
            (train, val), *_ = splits
            header += ["Training images 训练", "Validation images 验证"]
            columns += [[train[name] for name in p.classes], [val[name] for name in p.classes]]
        else:
            header += ["Images 图像", "Validation images per fold 每折验证"]
            per_fold = [[val[name] for _, val in splits] for name in p.classes]
            columns += [list(map(sum, per_fold)), [_range(counts) for counts in per_fold]]
    else:
        header.append("Images 图像")
        columns.append([run.metrics["per_class"][name]["support"] for name in p.classes])
    if p.groups is not None:
        where = "Validation patients 验证患者" if run.kind == SINGLE else "Patients 患者"
        header.append(where)
        columns.append([len(np.unique(p.groups[p.labels == c])) for c in range(len(p.classes))])
    rows = [list(row) for row in zip(p.classes, *columns, strict=True)]
    last = ["All 合计"] + [
        sum(column) if all(isinstance(n, int) for n in column) else "" for column in columns
    ]
    caption = ""
    if p.groups is not None:
        n_patients = len(np.unique(p.groups))
        if last[-1] != n_patients:
            caption = (
                "A patient who has images of several classes counts in each of them, and once in all. "
                "有多个类别图像的患者在各类别中分别计数，在合计中只计一次。"
            )
        last[-1] = n_patients
    return {"header": header, "rows": [*rows, last]}, caption


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def evaluated(run: RunFolder) -> Table | None:
    """On which images finished models were evaluated, and by what; None for other kinds."""
    if run.kind != EVALUATION:
        return None
    return {"header": [], "rows": _images(run.config) + _program(run.config)}


def _images(config: Mapping[str, Any]) -> list[list[str]]:
    rows = [["Images 图像", f"{config['data_dir']}, fingerprint {config['dataset_fingerprint'][:16]}"]]
    patients = config.get("group_pattern") or config.get("groups_file")
    return [*rows, ["Patients from 患者来源", str(patients)]] if patients else rows


def _program(config: Mapping[str, Any]) -> list[list[str]]:
    versions = ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items())
    return [
        ["Versions 版本", versions],
        ["Program at commit 程序版本", config.get("git_commit") or "not in a git checkout"],
    ]


def facts(run: RunFolder, trained_with: Mapping[str, Any] | None) -> Table:
    """How the model came about."""
    config, o = run.config, trained_with
    rows = []
    if run.kind == EVALUATION:
        rows.append(["Models 模型", "; ".join(_models(config))])
        rows += [["Trained on 训练图像", o["data_dir"]]] if o else []
        if run.differing:
            words = f"{', '.join(run.differing)}; what is said of training here is the first model's"
            rows.append(["The models differ in 模型的不同之处", words])
    else:
        rows += _images(config)
        if config.get("val_dir"):
            rows.append(["Validation 验证", str(config["val_dir"])])
        else:
            how = (
                f"{config['n_splits']} folds"
                if run.kind == CROSS_VALIDATION
                else f"hold-out of {config['val_ratio']:g}"
            )
            level = "patient 按患者" if run.by_patient else "image 按图像"
            rows.append(["Split 划分", f"{how}, stratified, by {level}, seed {config['random_state']}"])
    if o is None:
        rows.append(["Training 训练", "not known: no checkpoint could be read"])
    else:
        rows += [
            ["Image encoder 图像编码器", f"{o['image_encoder_name']}, weights: {o['image_weights']}"],
            ["Text encoder 文本编码器", f"{o['text_encoder_name']}, weights: {o['text_weights']}"],
            [
                "Input 输入",
                f"{o['img_size']} x {o['img_size']} pixels, augmentation: {augmentation_words(o)}",
            ],
            [
                "Training 训练",
                f"{_epochs(run, o)}, batch {o['batch_size']}, "
                f"{rates_words(o)}, loss {loss_words(o)}, seed {o['random_state']}",
            ],
        ]  # fmt: skip
        if changed := changed_words(o):
            rows.append(["Changed on resuming 续训时的改动", changed])
    if "million_parameters" in config:
        rows.append(["Parameters 参数量", f"{config['million_parameters']:.1f} million"])
    if "hardware" in config:
        rows.append(["Hardware 硬件", config["hardware"]])
    if run.kind != EVALUATION:
        rows += _program(config)
    return {"header": [], "rows": rows}


def _epochs(run: RunFolder, options: Mapping[str, Any]) -> str:
    """How many were trained, of how many; of an evaluation's models only what was asked for."""
    asked = number(options["epochs"], "epoch", "epochs")
    if not options["early_stopping_patience"]:
        return asked
    trained = ", ".join(str(len(history["val_acc"])) for history in run.histories.values())
    return f"at most {asked}{f' (trained: {trained})' if trained else ''}"


def _models(config: Mapping[str, Any]) -> list[str]:
    """An evaluation's checkpoints, each with what is known of it."""
    made = []
    for path, model in zip_longest(config["checkpoints"], config.get("models", ()), fillvalue={}):
        known = [str(model[key]) for key in ("image_encoder_name", "text_encoder_name") if key in model]
        known += [f"epoch {model['epoch']}"] if "epoch" in model else []
        made.append(f"{path} ({', '.join([*known, which_epoch(model)])})")
    return made


def options_table(run: RunFolder, names: Sequence[str] | None = None) -> Table:
    """config.json as rows; of the options `names` alone where given."""
    hidden = ("class_texts", "classes", "versions", "changed_options", "changed_on_resume")
    chosen = [name for name in run.config if name not in hidden] if names is None else names
    return {
        "header": ["Option 选项", "Value 值"],
        "rows": [[name, plain(run.config.get(name))] for name in chosen],
    }


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(own)}" for key, own in value.items())
    if isinstance(value, list):
        return "; ".join(map(plain, value))
    if isinstance(value, bool):
        return str(value).lower()  # as config.json has it
    return "–" if value is None else str(value)


def sentences_table(run: RunFolder) -> Table:
    texts = run.config.get("class_texts", {})
    return {
        "header": ["Class 类别", "Sentences 描述"],
        "rows": [[name, " / ".join(own)] for name, own in texts.items()],
    }


def epochs_table(run: RunFolder) -> tuple[Table, str]:
    """Last beside best epoch, and what to know of it."""
    if run.kind == CROSS_VALIDATION:
        best = {fold: run.best_epoch(fold) for fold in run.histories}
        last = dict.fromkeys(run.histories, 0)
        rows = [
            [title, *(_mean_std(run, key, epochs) for epochs in (last, best))]
            for key, title in _HISTORY.items()
        ]
        monitor, numbers = run.config["early_stopping_monitor"], ", ".join(map(str, best.values()))
        caption = (
            f"Mean ± sample standard deviation over {len(run.histories)} folds. Best epochs by {monitor}: "
            f"{numbers}. 各折的均值 ± 样本标准差；各折的最佳轮次按 {monitor} 挑选。"
        )
        return {
            "header": ["", "Last epoch 最后", "Best epoch 最佳 (optimistic 偏乐观)"],
            "rows": rows,
        }, caption
    history, best = run.histories[0], run.best_epoch(0)
    last = len(history["val_loss"])
    rows = [
        [title, *(_of_epoch(key, history[key][epoch - 1]) for epoch in (last, best))]
        for key, title in _HISTORY.items()
    ]
    header = ["", f"Last epoch 最后 ({last})", f"Best epoch 最佳 ({best}, optimistic 偏乐观)"]
    monitor = run.config["early_stopping_monitor"]
    return {"header": header, "rows": rows}, f"Best by {monitor}. 最佳轮次按 {monitor} 挑选。"


def _of_epoch(key: str, value: float) -> str:
    return f"{value:.4f}" if "loss" in key else f"{value:.2f}"


def _mean_std(run: RunFolder, key: str, epochs: Mapping[int, int]) -> str:
    """Over the folds, each at its own epoch (from 1; 0 is the last)."""
    values = [run.histories[fold][key][epoch - 1] for fold, epoch in epochs.items()]
    return f"{_of_epoch(key, np.mean(values))} ± {_of_epoch(key, np.std(values, ddof=1))}"


def confusion_table(run: RunFolder) -> Table:
    counts = np.array(run.metrics["confusion_matrix"])
    rows = [
        [name, *(f"{n} ({rounded(100 * n / own.sum())})" if own.sum() else str(n) for n in own)]
        for name, own in zip(run.predictions.classes, counts, strict=True)
    ]
    return {"header": ["true \\ predicted 真实 \\ 预测", *run.predictions.classes], "rows": rows}


def per_class_table(run: RunFolder) -> Table:
    rows = []
    for name, own in run.metrics["per_class"].items():
        cells = [value_and_interval(own[key], title) for key, title in PER_CLASS.items()]
        rows.append([name, own["support"], *("\n".join(cell) for cell in cells)])
    titles = ("Sensitivity\n灵敏度", "Specificity\n特异度", "Precision\n精确率", "F1", "ROC-AUC", "AP")
    return {"header": ["Class\n类别", "Images\n图像", *titles], "rows": rows}


def temperature_table(run: RunFolder, trained_with: Mapping[str, Any] | None) -> tuple[Table, str]:
    metrics = run.metrics
    scaling = metrics["calibration"]["temperature_scaling"]
    names = {"ece": "ECE", "nll": "NLL (nats)", "brier": "Brier score"}
    if scaling is None:
        header = ["", "Value 值"]
        rows = [[title, f"{metrics[key]['value']:.3f}"] for key, title in names.items()]
        if metrics["accuracy"]["value"] == 1:
            en = "No temperature was fitted: every image is right, so the sharper the better."
            zh = "未拟合温度：所有图像都判对，概率越尖锐越好，没有最佳温度。"
        else:
            en = (
                "No temperature was fitted: the images do not settle one. They are too few, of one patient, "
                "or hardly any is wrong, or the best for a part of them is not between 1/20 and 20."
            )
            zh = (
                "未拟合温度：这些图像不足以确定温度。图像太少、都属于同一位患者、几乎没有判错的，"
                "或一部分图像的最佳温度不在 1/20 到 20 之间。"
            )
    else:
        header = ["", "Before\n校准前", "After temperature scaling\n温度缩放后"]
        rows = [
            [title, f"{scaling[f'{key}_before']:.3f}", f"{scaling[f'{key}_after']:.3f}"]
            for key, title in names.items()
        ]
        of_folds = run.kind == CROSS_VALIDATION
        parts = "the other folds" if of_folds else "the other half of the images"
        en = (
            f"“After” is fair: each image is scaled by a temperature fitted on {parts}. For new images the "
            f"temperature fitted on all is {scaling['temperature']:.3f} (above 1: less sure); no program "
            "here applies it by itself."
        )
        zh = (
            f"“温度缩放后”是公平的：每张图像所用的温度由{'其他各折' if of_folds else '另一半图像'}拟合。"
            f"用于新图像的温度由全部图像拟合，为 {scaling['temperature']:.3f}（大于 1 即更不自信）；"
            "这里没有程序会自动使用它。"
        )
        if of_folds:
            en += " It is that of the folds' single models, not of their mean."
            zh += "它属于各折的单个模型，而非它们的平均。"
        if scaling["nll_after"] >= scaling["nll_before"]:
            en += " Here it does not lower the NLL: none is needed, or the images are too few to fit it."
            zh += "这里它没有降低 NLL：不需要，或图像太少。"
    if chance := metrics["calibration"].get("ece_if_calibrated"):  # earlier versions did not write it
        en += (
            f" Were the model's own probabilities perfectly calibrated, chance alone would make their ECE "
            f"{chance['mean']:.3f} on these images on average, and seldom more than {chance['p95']:.3f} "
            "(95th percentile)"
        )
        zh += (
            f"即使模型自身的概率完全校准，仅因偶然，在这些图像上 ECE 平均也有 {chance['mean']:.3f}，"
            f"很少超过 {chance['p95']:.3f}（第 95 百分位）"
        )
        several = metrics["n_groups"] not in (None, metrics["n_images"])
        en += "; more where images of one patient are alike." if several else "."
        zh += "；同一患者的图像相似时更大。" if several else "。"
    models = run.models_trained_with(trained_with) if trained_with is not None else []
    evened = next(filter(weight_for_rare_classes, models), None)
    if evened:
        en += (
            f" Training made up for rare classes ({loss_words(evened)}): probabilities suppose a class that "
            "was rare in training to be more frequent than it was, and a temperature cannot mend that."
        )
        zh += (
            f"训练时照顾了稀有类别（{loss_words(evened)}）：概率假定它们比在训练图像中更常见，温度无法纠正。"
        )
    return {"header": header, "rows": rows}, f"{en} {zh}"
