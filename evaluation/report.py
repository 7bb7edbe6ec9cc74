"""report.html of a run: one file that opens anywhere, offline, and its figures as PNG and SVG.

    python -m evaluation.report RUN_DIR

Everything comes from the files of the folder and the images they name, so a report can be remade at any time.
"""

import argparse
import base64
import io
import string
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from common.cli import Parser, exit_code_of, imports
from common.files import printable, write_whole
from common.progress import progress

with imports():
    import jinja2
    import numpy as np
    from PIL import Image

    from evaluation import figures, fonts, report_tables, report_text
    from evaluation.claim import claim_items
    from evaluation.model_views import Mistake, Views, look
    from evaluation.run_folder import (
        CROSS_VALIDATION,
        EVALUATION,
        RunFolder,
        read_run_folder,
        weight_for_rare_classes,
    )
    from evaluation.tables import OVERALL, PER_CLASS, why_missing

FIGURES = (
    "learning_loss", "learning_accuracy", "confusion_matrix", "roc", "precision_recall", "calibration",
    "embedding_map", "mistakes",
)  # fmt: skip
_FONT_PLACE = "/* the font of the characters below */"
_DRAWN_BESIDES_NAMES = string.printable + "–−×±…·"


def write_report(run_dir: Path) -> Path:
    """Write report.html and figures/ into the folder of a finished run, cross-validation or evaluation.

    A picture, checkpoint or data check that is missing is said in the report. Raises UserError when a file
    that every finished run has is missing or damaged.
    """
    run = read_run_folder(run_dir)
    print("drawing the report ...", flush=True)  # it takes seconds, on a busy machine more
    views = look(run)
    html = page(run, views, training_options(run, views), draw(run, views))
    path = run_dir / "report.html"
    write_whole(path, lambda file: file.write(html.encode()))
    return path


def training_options(run: RunFolder, views: Views) -> Mapping[str, Any] | None:
    """What the model was trained with, "auto" weights replaced by what they were; None if not known."""
    options = run.config
    if run.kind == EVALUATION:
        facts = views.facts
        options = {**facts["config"], "changed_on_resume": facts.get("changed_on_resume")} if facts else None
    if options is None or not views.facts:
        return options
    published = views.facts.get("pretrained", {})
    weights = {
        f"{side}_weights": "published" if names else "random"
        for side, names in published.items()
        if options[f"{side}_weights"] in ("auto", "none")
    }
    return {**options, **weights}


def draw(run: RunFolder, views: Views) -> dict[str, str]:
    """Write all figures of the run; figures of an earlier report that it has not are removed.

    Returns name -> data URI for the page.
    """
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    p, metrics = run.predictions, run.metrics
    drawn = {}
    with (
        fonts.figure_font("".join(p.classes) + "".join(p.paths) + _DRAWN_BESIDES_NAMES) as families,
        figures.style(families),
    ):
        made = learning_figures(run) | {
            "confusion_matrix": figures.confusion_matrix(np.array(metrics["confusion_matrix"]), p.classes),
            "roc": figures.roc_curves(p.probs, p.labels, metrics["per_class"]),
            "precision_recall": figures.precision_recall_curves(p.probs, p.labels, metrics["per_class"]),
            "calibration": figures.reliability(p.probs, p.labels, metrics["calibration"]["bins"]),
        }
        if views.space:
            rows = views.space.rows
            made["embedding_map"] = figures.embedding_map(
                views.space.points, p.labels[rows], p.probs[rows].argmax(1) != p.labels[rows],
                views.space.sentences, p.classes, views.space.shares,
            )  # fmt: skip
        shown = [mistake for mistake in views.mistakes if mistake.picture is not None]
        if shown:
            made["mistakes"] = figures.gallery([_for_paper(run, mistake) for mistake in shown])
        for name, figure in progress(made.items(), "drawing"):
            drawn[name] = _data_uri(figures.save(figure, folder, name).encode(), "image/svg+xml")
    for name in FIGURES:
        if name not in drawn:
            for suffix in ("png", "svg"):
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    return drawn


def learning_figures(run: RunFolder) -> dict[str, Any]:
    if not run.histories:
        return {}
    best = None if run.kind == CROSS_VALIDATION else run.best_epoch(0)

    def curves(**names: str) -> dict[str, list[list[float]]]:
        return {
            title.replace("_", " "): [history[key] for history in run.histories.values()]
            for title, key in names.items()
        }

    return {
        "learning_loss": figures.learning_curve(
            curves(training="train_loss_image_to_text", validation="val_loss"),
            "Loss, image to text (nats)",
            best,
        ),
        "learning_accuracy": figures.learning_curve(
            curves(training="train_acc", validation="val_acc", validation_balanced="val_balanced_acc"),
            "Accuracy (%)",
            best,
        ),
    }


def page(
    run: RunFolder, views: Views, trained_with: Mapping[str, Any] | None, inlined: Mapping[str, str]
) -> str:
    """The whole HTML, with the font of its Chinese characters."""
    images, images_caption = report_tables.images_table(run)
    epochs, epochs_caption = report_tables.epochs_table(run) if run.histories else (None, "")
    temperature, temperature_caption = report_tables.temperature_table(run, trained_with)
    changed = run.config.get("changed_options")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names and paths are whatever a folder is called
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        title=run.path.resolve().name,
        kind=report_text.KINDS[run.kind],
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        tested=report_text.tested(run),
        cards=report_text.cards(run),
        intervals=report_text.interval_note(run),
        contents=_contents(run),
        notes=report_text.notes(run),
        measures=report_tables.measures(run),
        measures_missing=" ".join(why_missing(run.metrics[key] for key in OVERALL)),
        images=images,
        images_caption=images_caption,
        evaluated=report_tables.evaluated(run),
        facts=report_tables.facts(run, trained_with),
        changed=report_tables.options_table(run, changed) if changed else None,
        options=report_tables.options_table(run),
        sentences=report_tables.sentences_table(run),
        figures=inlined,
        curves_caption=_curves_caption(run),
        epochs=epochs,
        epochs_caption=epochs_caption,
        confusion=report_tables.confusion_table(run),
        many=len(run.predictions.classes) > figures.FEW,
        per_class=report_tables.per_class_table(run),
        per_class_caption=_per_class_caption(run),
        temperature=temperature,
        temperature_caption=temperature_caption,
        problems=views.problems,
        mistakes=[_for_page(run, mistake) for mistake in views.mistakes],
        mistakes_caption=report_text.mistakes_caption(run, views),
        map_caption=report_text.map_caption(run, views),
        findings=report_text.findings(run),
        quick_check=run.check is not None and "shortcuts" not in run.check,
        claim=[
            {**vars(item), "word": report_text.STATUS[item.status]}
            for item in claim_items(run, trained_with, views.n_mistakes)
        ],
    )
    return html.replace(_FONT_PLACE, _font_css(html), 1)


def _contents(run: RunFolder) -> list[tuple[str, str]]:
    curves = [("curves", "Learning curves 学习曲线")] if run.histories else []
    return [
        ("data", "Data 数据"), *curves, ("confusion", "Confusion 混淆矩阵"), ("per-class", "Classes 各类别"),
        ("roc", "ROC 曲线"), ("calibration", "Calibration 校准"), ("mistakes", "Mistakes 错误"),
        ("map", "Map 分布图"), ("check", "Data check 数据检查"), ("claim", "CLAIM 2024"),
    ]  # fmt: skip


def _curves_caption(run: RunFolder) -> str:
    folds = (
        "Thin lines are the folds, the strong one is their mean. 细线为各折，粗线为均值。 "
        if len(run.histories) > 1
        else ""
    )
    of_training = weight_for_rare_classes(run.config)
    if run.config.get("cutmix_prob"):
        of_training.append("CutMix")
    alike, zh = "the same for training and validation", "训练与验证的算法相同"
    if of_training:
        alike = f"in training with {' and '.join(of_training)}, which validation goes without"
        zh = f"训练时有 {'、'.join(of_training)}，验证时没有"
    return (
        f"{folds}The loss is the image-to-text part, {alike}; training is measured with augmentation and "
        f"while the weights change. 损失为图像到文本部分，{zh}；训练指标是在数据增强下、权重变化中测得的。"
    )


def _per_class_caption(run: RunFolder) -> str:
    unit = run.metrics["interval"]["unit"]
    en, zh = why_missing(own[key] for own in run.metrics["per_class"].values() for key in PER_CLASS)
    return f"Each class against the rest, with 95 % intervals over {unit}s. {en} 每个类别对其余类别。{zh}"


def _font_css(html: str) -> str:
    used = "".join(sorted({c for c in html if ord(c) >= fonts.FIRST_CJK}))
    data = fonts.small_font(used, "woff") if used else None
    if data is None:
        return ""
    source = f'url({_data_uri(data, "font/woff")}) format("woff")'
    return f'@font-face {{ font-family: "{fonts.FAMILY}"; src: {source}; unicode-range: U+2E80-3FFFF; }}'


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(picture: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", quality=85)
    return _data_uri(data.getvalue(), "image/jpeg")


def _views_of(run: RunFolder, mistake: Mistake) -> list[tuple[str, np.ndarray]]:
    """The pictures there are, each with its caption."""
    classes = run.predictions.classes
    views = (
        ("image 原图", mistake.picture),
        (f"for {classes[mistake.prediction]}\npredicted 预测", mistake.for_prediction),
        (f"for {classes[mistake.label]}\ntrue 真实", mistake.for_label),
    )
    return [(caption, picture) for caption, picture in views if picture is not None]


def _for_page(run: RunFolder, mistake: Mistake) -> dict[str, Any]:
    classes = run.predictions.classes
    return {
        "path": mistake.path,
        "label": classes[mistake.label],
        "prediction": classes[mistake.prediction],
        "label_probability": f"{100 * mistake.label_probability:.1f}\N{NO-BREAK SPACE}%",
        "probability": f"{100 * mistake.probability:.1f}\N{NO-BREAK SPACE}%",
        "views": [
            {"caption": caption, "src": _jpeg(picture)} for caption, picture in _views_of(run, mistake)
        ],
    }


def _for_paper(run: RunFolder, mistake: Mistake) -> figures.Picture:
    label, prediction = (
        figures.short(run.predictions.classes[c], 14) for c in (mistake.label, mistake.prediction)
    )
    title = (
        f"{figures.short(mistake.path, 48)}\ntrue {label} ({100 * mistake.label_probability:.1f} %), "
        f"predicted {prediction} ({100 * mistake.probability:.1f} %)"
    )
    captions = ("image", f"for {prediction}", f"for {label}")
    pictures = (mistake.picture, mistake.for_prediction, mistake.for_label)
    return figures.Picture(
        title, [(c, picture) for c, picture in zip(captions, pictures, strict=True) if picture is not None]
    )


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m evaluation.report", description="Remake report.html and figures/ of a run folder."
    )
    parser.add_argument("run_dir", type=Path, help="folder of a finished run, cross-validation or evaluation")
    return parser.read(typed, required=())


def main(typed: Sequence[str] | None = None) -> int:
    def program() -> int:
        print(write_report(read_arguments(sys.argv[1:] if typed is None else typed).run_dir))
        return 0

    return exit_code_of(program, "no report was written")


if __name__ == "__main__":
    sys.exit(main())
