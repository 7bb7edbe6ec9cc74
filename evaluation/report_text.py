"""The sentences of the report, in English and Chinese. Plain text: the template escapes it."""

from typing import Any

from common.errors import number
from evaluation.model_views import Views
from evaluation.run_folder import CROSS_VALIDATION, EVALUATION, SINGLE, RunFolder
from evaluation.tables import OVERALL, rounded, value_and_interval, why_missing

Text = dict[str, str]  # "en" and "zh"

KINDS = {
    SINGLE: {"en": "One training run, one validation split", "zh": "单次训练与验证划分"},
    CROSS_VALIDATION: {"en": "Cross-validation", "zh": "交叉验证"},
    EVALUATION: {"en": "Evaluation of models on labelled images", "zh": "模型在标注图像上的评估"},
}
CARDS = (
    ("accuracy", "Accuracy", "准确率"),
    ("balanced_accuracy", "Balanced accuracy", "平衡准确率"),
    ("macro_f1", "Macro-F1", "宏平均 F1"),
    ("macro_roc_auc", "Macro ROC-AUC", "宏平均 AUC"),
)
LEVELS = {"danger": "danger 危险", "warning": "warning 警告", "note": "note 提示"}
STATUS = {
    "answered": "run 由运行给出",
    "partly": "partly 部分",
    "authors": "authors 作者填写",
}
_MOST_EXAMPLES = 8


def both(en: str, zh: str) -> Text:
    return {"en": en, "zh": zh}


def cards(run: RunFolder) -> list[dict[str, Any]]:
    made = []
    for key, en, zh in CARDS:
        value, below = value_and_interval(run.metrics[key], OVERALL[key])
        made.append({**both(en, zh), "value": value, "below": below or "no interval 无区间", "plain": False})
    majority, share = run.baseline()
    alike = len(set(majority)) == 1
    answer = majority[0] if alike else "each fold's most frequent training class"
    made.append(
        {
            **both("Majority baseline", "多数类基线"),
            "value": f"{rounded(100 * share)} %",
            "below": f"accuracy of always answering {answer}",
            "plain": True,
        }
    )
    return made


def tested(run: RunFolder) -> str:
    groups = run.metrics["n_groups"]
    of = f" of {number(groups, 'patient', 'patients')}" if groups else ""
    return number(run.metrics["n_images"], "image", "images") + of


def interval_note(run: RunFolder) -> Text:
    interval = run.metrics["interval"]
    patients = interval["unit"] == "patient"
    en, zh = why_missing(run.metrics[key] for key, *_ in CARDS)
    return both(
        f"95 % intervals over {interval['unit']}s. {en}",
        f"95% 区间按{'患者' if patients else '图像'}计算。{zh}",
    )


def notes(run: RunFolder) -> list[Text]:
    """What a reader must know before believing the numbers."""
    found = []
    if run.kind == CROSS_VALIDATION:
        folds = run.config["n_splits"]
        found.append(
            both(
                "Every image was predicted once, by the model of the fold that did not train on it. The "
                f"{folds} models differ: these numbers are those of the method, not of one model.",
                f"每张图像由未用其训练的一折预测；{folds} 折模型各不相同，数值反映的是方法。",
            )
        )
    if run.kind == EVALUATION:
        n_models = len(run.config["checkpoints"])
        ensemble = f" The probabilities are the mean of {n_models} models." if n_models > 1 else ""
        known, n = run.config.get("n_known_images"), run.metrics["n_images"]
        if known:
            en = f"Of these {n} images {known} served to train or validate a model: the numbers are too good."
            zh = f"这 {n} 张图像中有 {known} 张曾用于训练或验证模型，结果过于乐观。"
        elif known is None:
            en = "Whether a model was trained or validated on some of these images is not known."
            zh = "模型是否用过其中的图像，无法得知。"
        else:
            en = "None of these images is, by its pixels, one that a model was trained or validated on."
            zh = "按像素比较，这些图像都没有用于训练或验证模型。"
        found.append(both(en + ensemble, zh))
    else:
        monitor = run.config["early_stopping_monitor"]
        found.append(
            both(
                "The last epoch is reported; it was not chosen. The best epoch beside it was chosen by "
                f"{monitor} on the very images it is then measured on, so its numbers are optimistic.",
                f"报告的是最后一个轮次，未经挑选。最佳轮次按 {monitor} 在同一批图像上挑选，数值偏乐观。",
            )
        )
        if run.config.get("early_stopping_patience"):
            found.append(
                both(
                    "Early stopping looked at the validation images too, which makes the last epoch slightly "
                    "optimistic.",
                    "早停也依据验证图像，最后轮次的数值因此略偏乐观。",
                )
            )
    found += _absent_note(run)
    if run.kind != EVALUATION or run.config.get("n_known_images") != run.metrics["n_images"]:
        found.append(_partition_note(run))
    if run.metrics["interval"]["unit"] == "patient":
        found.append(
            both(
                "The intervals are over patients: a resample draws patients with all their images.",
                "区间按患者计算：每次重抽样抽取患者及其全部图像。",
            )
        )
    else:
        found.append(
            both(
                "The intervals are over images. Where patients have several images they are too narrow.",
                "区间按图像计算；若同一患者有多张图像，区间会过窄。",
            )
        )
    dangers = [f for f in (run.check or {}).get("findings", ()) if f["level"] == "danger"]
    if dangers:
        found.append(
            both(
                f"The data check found {number(len(dangers), 'danger', 'dangers')}; read "
                f"{'it' if len(dangers) == 1 else 'them'} before anything else.",
                f"数据检查发现 {len(dangers)} 项危险，请先阅读。",
            )
        )
    return found


def _absent_note(run: RunFolder) -> list[Text]:
    """What classes without images do to the means over the classes."""
    absent = {name: own for name, own in run.metrics["per_class"].items() if own["support"] == 0}
    if not absent:
        return []
    en = (
        f"There are no images of {', '.join(absent)}: balanced accuracy, macro-F1 and the other means over "
        "classes are over the rest."
    )
    zh = f"没有 {'、'.join(absent)} 的图像：平衡准确率、宏平均 F1 等对类别的平均只计其余类别。"
    for name, own in absent.items():
        if n := own["false_positives"]:
            were = number(n, "image was", "images were")
            en += f" But {were} taken for {name}, whose F1 therefore counts as 0 in macro-F1 and lowers it."
            zh += f"但有 {n} 张图像被判为 {name}，其 F1 在宏平均中按 0 计入，使之偏低。"
    return [both(en, zh)]


def _partition_note(run: RunFolder) -> Text:
    not_known = both(
        "Whether patients of these images were also in training is not known to the program.",
        "程序无法得知这些图像的患者是否也出现在训练集中。",
    )
    if run.kind == EVALUATION:
        return not_known
    if run.by_patient:
        return both("No patient is on both sides of the split.", "同一患者不会同时出现在训练集和验证集。")
    if run.config.get("val_dir"):
        return not_known
    return both(
        "The split is by image. If patients have several images, the model was tested on patients it had "
        "seen, and the numbers are too good; name the patients with --group-pattern or --groups-file.",
        "按图像划分。若同一患者有多张图像，结果会偏高；请用 --group-pattern 或 --groups-file 指明患者。",
    )


def mistakes_caption(run: RunFolder, views: Views) -> str:
    n, shown = views.n_mistakes, len(views.mistakes)
    if n == 0:
        return "No image is misclassified. 没有错误分类的图像。"
    of = f"All {n}" if shown == n else f"The {shown} most confident of {n}"
    heat = (
        " Heat maps: bright parts speak for the class rather than for the others. They show what the model "
        "used, not why, and coarsely: most encoders have one cell per 16 x 16 pixels of their input. A peak "
        "beside the lesion may be the grid, or a model that goes by something else: on synthetic films with "
        "known lesions it lay in the lesion for 8 to 75 % of the images, depending on the encoder. "
        "热图中明亮区域支持该类别；分辨率很粗，多数编码器每 16 x 16 像素一格；"
        "在病灶已知的合成图像上，最热点落在病灶内的占 8 % 到 75 %，因编码器而异。"
        if any(m.for_label is not None for m in views.mistakes)
        else ""
    )
    first = (
        " Heat maps are those of the first model."
        if heat and len(run.config.get("checkpoints", ())) > 1
        else ""
    )
    return f"{of} misclassified images of {run.metrics['n_images']}.{heat}{first}"


def map_caption(run: RunFolder, views: Views) -> str:
    space = views.space
    if space is None:
        return "The map could not be drawn: no model, or too few images that can be read. 无法绘制。"
    n = len(space.points)
    which = f"{n} of {space.n_images} images, drawn at random" if n < space.n_images else f"{n} images"
    if space.n_unreadable:
        which += f" ({space.n_unreadable} could not be read)"
    whose = {
        CROSS_VALIDATION: f" Model of fold {space.fold} and its validation images; other folds differ.",
        SINGLE: " Validation images.",
        EVALUATION: " First model." if len(run.config.get("checkpoints", ())) > 1 else "",
    }[run.kind]
    return (
        f"{which}.{whose} Principal axes of the images' unit vectors, which hold "
        f"{100 * space.shares.sum():.0f} % of their variance; stars are the class sentences in this space. "
        "图中圆点为图像，星形为类别描述，坐标为图像特征的前两个主成分。"
    )


def findings(run: RunFolder) -> list[dict[str, Any]] | None:
    """The data check's findings; None without a check."""
    if run.check is None:
        return None
    return [
        {**found, "word": LEVELS[found["level"]], "examples": found["examples"][:_MOST_EXAMPLES]}
        for found in run.check["findings"]
    ]
