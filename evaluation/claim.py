"""The CLAIM checklist, 2024 update: what the run itself can answer, and what is left to the authors.

Tejani et al. 2024, "Checklist for Artificial Intelligence in Medical Imaging (CLAIM): 2024 Update",
Radiology: Artificial Intelligence 6(4), e240300 (the update of Mongan et al. 2020). Numbers are the
checklist's, titles are ours: the wording that binds is in the paper.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import number
from evaluation.results import headline
from evaluation.run_folder import (
    CROSS_VALIDATION,
    EVALUATION,
    RunFolder,
    augmentation_words,
    changed_words,
    loss_words,
    rates_words,
    which_epoch,
)
from evaluation.tables import with_interval

ANSWERED, PARTLY, AUTHORS = "answered", "partly", "authors"

_ITEMS = (
    ("Title and abstract 题目与摘要", "That it is about AI, and of which kind", "说明是何种人工智能研究"),
    ("Title and abstract 题目与摘要", "Summary from design to conclusions", "设计、方法、结果与结论摘要"),
    ("Introduction 引言", "Background, intended use and role of the AI", "背景、预期用途与作用"),
    ("Introduction 引言", "Aims and hypotheses", "研究目的与假设"),
    ("Study design 研究设计", "Prospective or retrospective", "前瞻性或回顾性"),
    ("Study design 研究设计", "Goal of the study", "研究目标"),
    ("Data 数据", "Sources of the data", "数据来源"),
    ("Data 数据", "Who and what was included or excluded", "纳入与排除标准"),
    ("Data 数据", "Preprocessing", "数据预处理"),
    ("Data 数据", "Choice of subsets", "数据子集的选择"),
    ("Data 数据", "De-identification", "去标识化方法"),
    ("Data 数据", "Treatment of missing data", "缺失数据的处理"),
    ("Data 数据", "How the images were acquired", "图像采集方案"),
    ("Reference standard 参考标准", "How the reference standard was obtained", "参考标准的获得方法"),
    ("Reference standard 参考标准", "Why this reference standard", "选择该参考标准的理由"),
    ("Reference standard 参考标准", "Who made the reference annotations", "标注来源"),
    ("Reference standard 参考标准", "Annotation of the test set", "测试集的标注"),
    ("Reference standard 参考标准", "Agreement between and within annotators", "标注者间与标注者内差异"),
    ("Data partitions 数据划分", "How images were assigned to partitions", "划分方法"),
    ("Data partitions 数据划分", "Level at which the partitions share nothing", "划分互不重叠的层级"),
    ("Testing data 测试数据", "Planned sample size", "预定样本量"),
    ("Model 模型", "Description of the model", "模型描述"),
    ("Model 模型", "Software and versions", "软件与版本"),
    ("Model 模型", "Initial weights", "参数初始化"),
    ("Training 训练", "How it was trained", "训练方法"),
    ("Training 训练", "How the final model was chosen", "最终模型的选择"),
    ("Training 训练", "Ensembles", "集成方法"),
    ("Evaluation 评估", "Measures of performance", "性能指标"),
    ("Evaluation 评估", "Measures of significance and uncertainty", "显著性与不确定性"),
    ("Evaluation 评估", "Robustness or sensitivity analysis", "稳健性或敏感性分析"),
    ("Evaluation 评估", "Explainability", "可解释性方法"),
    ("Evaluation 评估", "Evaluation on internal data", "内部数据评估"),
    ("Evaluation 评估", "Testing on external data", "外部数据测试"),
    ("Evaluation 评估", "Registration of the trial", "临床试验注册"),
    ("Results: data 结果：数据", "Numbers included and excluded", "纳入与排除数量"),
    ("Results: data 结果：数据", "Patients' characteristics in each partition", "各划分的人口学与临床特征"),
    ("Results: performance 结果：性能", "Performance with its uncertainty", "性能及其不确定性"),
    ("Results: performance 结果：性能", "Diagnostic performance and its precision", "诊断性能及其精度"),
    ("Results: performance 结果：性能", "Analysis of errors", "错误分析"),
    ("Discussion 讨论", "Limitations", "研究局限"),
    ("Discussion 讨论", "Implications for practice", "对实践的意义"),
    ("Other 其他", "Study protocol or further technical detail", "研究方案或更多技术细节"),
    ("Other 其他", "Availability of software, model and data", "软件、模型与数据的可得性"),
    ("Other 其他", "Funding and role of funders", "经费来源"),
)  # fmt: skip


@dataclass(frozen=True)
class ClaimItem:
    """status: ANSWERED by the run, PARTLY (the authors add to it), or left to the AUTHORS (empty answer)."""

    number: int
    section: str
    title: str
    title_zh: str
    status: str
    answer: str


def claim_items(run: RunFolder, trained_with: Mapping[str, Any] | None, n_mistakes: int) -> list[ClaimItem]:
    """All 44 items in order. trained_with: the options of the training; None where they are not known."""
    answers = _of_data(run) | _of_results(run, n_mistakes)
    if trained_with is not None:
        answers |= _of_training(run, trained_with)
    return [
        ClaimItem(number, section, title, title_zh, *answers.get(number, (AUTHORS, "")))
        for number, (section, title, title_zh) in enumerate(_ITEMS, 1)
    ]


def _of_data(run: RunFolder) -> dict[int, tuple[str, str]]:
    config, metrics = run.config, run.metrics
    per_class = config["images_per_class"]
    total = f"{number(sum(per_class.values()), 'image', 'images')} of {len(per_class)} classes"
    counts = ", ".join(f"{name} {n}" for name, n in per_class.items())
    n_groups = metrics["n_groups"]
    patients = f" of {number(n_groups, 'patient', 'patients')}" if n_groups else ""
    tested = f"{number(metrics['n_images'], 'image', 'images')}{patients}"
    unreadable = (
        "Images that cannot be read were left out (--skip-unreadable)."
        if config.get("skip_unreadable")
        else "Every image could be read: one that cannot stops the program."
    )
    check, excluded = "", []
    if run.check:
        findings = run.check["findings"]
        check = f"; the data check has {number(len(findings), 'finding', 'findings')}"
        n = sum(found["count"] for found in findings if found.get("kind") == "unreadable")
        if n and config.get("skip_unreadable"):  # runs of earlier versions did not say what they left out
            excluded.append(number(n, "unreadable image", "unreadable images"))
        for found in findings:
            if found.get("kind") == "no_class":
                images = number(found["count"], "image", "images")
                excluded.append(f"{images} of no class of the model ({', '.join(found['examples'])})")
    left_out = f"; excluded: {' and '.join(excluded)}, see data_check.json" if excluded else ""
    answers = {
        7: (
            PARTLY,
            f"Folder {config['data_dir']}: {total}, fingerprint {config['dataset_fingerprint'][:16]}.",
        ),
        12: (PARTLY, unreadable),
        14: (PARTLY, "The class of an image is the folder it lies in."),
        21: (PARTLY, f"Not planned by the program. Tested on {tested}."),
        35: (PARTLY, f"{total} ({counts}){left_out}{check}. Evaluated: {tested}."),
        36: (PARTLY, "Images per class and partition: see the table of the data above."),
    }
    if run.kind == EVALUATION:
        known = config.get("n_known_images")
        if not known:
            whether = "" if known == 0 else " whether a model was made with some of them is not known, and"
            answers[33] = (
                PARTLY,
                f"This evaluation: {tested};{whether} that the data are external is for the authors.",
            )
        return answers
    level = "patient" if run.by_patient else "image"
    with_twins = ", images with identical pixels or of one name in two formats kept together"
    answers[20] = (ANSWERED, f"By {level}{with_twins}.")
    if config.get("val_dir"):
        how = f"A ready validation folder ({config['val_dir']})."
        if run.by_patient:
            answers[20] = (ANSWERED, "By patient: a patient in both folders stops the program.")
        else:
            answers[20] = (PARTLY, "As that folder was made; the program does not know its patients.")
    elif run.kind == CROSS_VALIDATION:
        how = (
            f"{config['n_splits']}-fold cross-validation, stratified by class, seed {config['random_state']}."
        )
    else:
        share = 100 * config["val_ratio"]
        how = f"About {share:g} % of each class held out at random, seed {config['random_state']}."
    readable = " that can be read" if config.get("skip_unreadable") else ""
    answers[10] = (ANSWERED, f"None: all images of the class folders{readable}.")
    answers[19] = (ANSWERED, f"{how} The lists of files are in splits.json.")
    where = "out of fold" if run.kind == CROSS_VALIDATION else "on held-out images"
    answers[32] = (ANSWERED, f"{tested}, {where}.")
    if config.get("val_dir"):
        words = f"{tested} of that folder; whether its data are internal or external is for the authors."
        answers[32] = (PARTLY, words)
    return answers


def _of_training(run: RunFolder, options: Mapping[str, Any]) -> dict[int, tuple[str, str]]:
    augmentation = f"Augmentation in training: {augmentation_words(options)}."
    changed = changed_words(options)
    versions = ", ".join(f"{name} {version}" for name, version in run.config.get("versions", {}).items())
    commit = run.config.get("git_commit")
    frozen = [side for side in ("image", "text") if options[f"freeze_{side}_encoder"]]
    stop = options["early_stopping_patience"]
    stopping = next(
        (
            " Training could stop early: "
            f"{number(own['early_stopping_patience'], 'epoch', 'epochs')} without gain in "
            f"{own['early_stopping_monitor']} on the validation images."
            for own in run.models_trained_with(options)
            if own["early_stopping_patience"]
        ),
        "",
    )
    n_models = len(run.config.get("checkpoints", [1]))
    answers = {
        1: (PARTLY, "Deep learning: an image and a text encoder with one embedding space (CLIP)."),
        9: (
            ANSWERED,
            f"Whole image resized to a square of {options['img_size']} pixels (bicubic), 8 bits per "
            f"channel; images of more bits scaled by their own range, DICOM by its window or table. "
            f"{augmentation}",
        ),
        22: (
            ANSWERED,
            f"Image encoder {options['image_encoder_name']}, text encoder {options['text_encoder_name']}, "
            f"one linear projection each to {options['embed_dim']} dimensions; the class is the one whose "
            "sentences are nearest by cosine, its probability a softmax with a learned temperature.",
        ),
        23: (ANSWERED, f"{versions}{f'; program at commit {commit}' if commit else ''}."),
        24: (
            ANSWERED,
            f"Image encoder: {options['image_weights']}; text encoder: {options['text_weights']}; the rest "
            f"random, seed {options['random_state']}.",
        ),
        25: (
            ANSWERED,
            f"AdamW, {'at most ' if stop else ''}{number(options['epochs'], 'epoch', 'epochs')}, batches "
            f"of {options['batch_size']}, {rates_words(options)}, weight decay {options['weight_decay']:g}, "
            f"loss {loss_words(options)}, {' and '.join(frozen) or 'no'} encoder frozen. {augmentation}"
            f"{f' Options changed on resuming: {changed}.' if changed else ''}",
        ),
        26: _which_epochs(run, stopping),
        27: (
            ANSWERED,
            f"Mean of the probabilities of {n_models} models." if n_models > 1 else "None in these results.",
        ),
        42: (PARTLY, "Every option and number: config.json, splits.json and history.json of the run."),
        43: (PARTLY, "The trained weights are in the checkpoints of the run's folder."),
    }  # fmt: skip
    if run.kind == EVALUATION:
        answers[42] = (
            PARTLY,
            "What was evaluated on what: config.json. The options, splits and epochs of a model's training "
            "are in the folder of its own run, not in this one.",
        )
        answers[43] = (PARTLY, "The trained weights are the checkpoints that config.json names.")
    if run.differing:  # what the others were trained with is for the authors
        differ = f" This is the first model's; the models differ in {', '.join(run.differing)}."
        answers |= {number: (PARTLY, answers[number][1] + differ) for number in (9, 22, 24, 25)}
    return answers


def _which_epochs(run: RunFolder, stopping: str) -> tuple[str, str]:
    """A run reports its last epoch; of an evaluation's models each may be of another kind."""
    models = [{"epoch_is": "last"}]
    if run.kind == EVALUATION:
        models = run.config.get("models", [{}])
    kinds = Counter(map(which_epoch, models))
    words = "; ".join(f"{n} of {len(models)} models: {kind}" for kind, n in kinds.items())
    if len(kinds) == 1:
        words = next(iter(kinds)).capitalize()
    known = all("epoch_is" in model for model in models) and not run.differing
    return ANSWERED if known else PARTLY, f"{words}.{stopping}"


def _of_results(run: RunFolder, n_mistakes: int) -> dict[int, tuple[str, str]]:
    metrics = run.metrics
    interval = metrics["interval"]
    by_class = "; ".join(
        f"{name}: sensitivity {with_interval(own['sensitivity'], '%')}, specificity "
        f"{with_interval(own['specificity'], '%')} %"
        for name, own in list(metrics["per_class"].items())[:8]
    )
    more = "; ..." if len(metrics["per_class"]) > 8 else ""
    return {
        28: (
            ANSWERED,
            "Accuracy, balanced accuracy, macro-F1, MCC, Cohen's kappa, ROC-AUC, average precision, "
            "sensitivity, specificity, precision, calibration (ECE, Brier score, NLL).",
        ),
        29: (
            ANSWERED,
            f"95 % intervals: bootstrap over {interval['unit']}s ({interval['resamples']} resamples; of "
            "means over classes without those that lack a class), Wilson's for proportions where they "
            "cannot be resampled by patient.",
        ),
        31: (
            PARTLY,
            "Heat maps of the similarity to a class's sentences against the others': HiResCAM, or "
            "Grad-CAM where the image encoder is a ViT.",
        ),
        37: (ANSWERED, f"{headline(metrics)}."),
        38: (ANSWERED, f"{by_class}{more}."),
        39: (
            PARTLY,
            f"{n_mistakes} of {metrics['n_images']} images are misclassified; confusion matrix and the "
            "most confident mistakes above.",
        ),
    }  # fmt: skip
