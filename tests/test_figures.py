"""Figures against what they draw, and the font that draws Chinese."""

import io
import re
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from fontTools.ttLib.tables.DefaultTable import DefaultTable
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation import figures, fonts
from evaluation.fonts import FAMILY, figure_font, small_font
from evaluation.metrics import full_metrics

CHINESE = ("正常", "肺炎", "气胸")


def example(n_classes, n=240, seed=0):
    random = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    logits = random.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += 1.5
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), labels


def metrics_of(probs, labels, classes):
    return full_metrics(probs, labels, classes, resamples=20)


def every_figure(classes):
    probs, labels = example(len(classes))
    metrics = metrics_of(probs, labels, classes)
    points = np.random.default_rng(0).normal(size=(len(labels), 2))
    picture = np.zeros((20, 30, 3), np.uint8)
    return {
        "learning": figures.learning_curve({"training": [[3, 2, 1], [3, 1]]}, "Loss (nats)", 2),
        "confusion": figures.confusion_matrix(np.array(metrics["confusion_matrix"]), classes),
        "roc": figures.roc_curves(probs, labels, metrics["per_class"]),
        "precision_recall": figures.precision_recall_curves(probs, labels, metrics["per_class"]),
        "calibration": figures.reliability(probs, labels, metrics["calibration"]["bins"]),
        "map": figures.embedding_map(
            points, labels, probs.argmax(1) != labels, points[: len(classes)], classes, (0.5, 0.2)
        ),
        "gallery": figures.gallery([figures.Picture(classes[0], [("image", picture)])] * 3),
    }


def test_chinese_names_are_drawn_without_a_missing_glyph_and_need_no_font(tmp_path):
    with warnings.catch_warnings(), figure_font("".join(CHINESE)) as families, figures.style(families):
        warnings.simplefilter("error")
        for name, figure in every_figure(CHINESE).items():
            figures.save(figure, tmp_path, name)
            svg = ET.parse(tmp_path / f"{name}.svg").getroot()
            assert not [tag for tag in svg.iter() if tag.tag.endswith(("}text", "}script"))]
            with Image.open(tmp_path / f"{name}.png") as png:
                assert png.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_the_font_is_forgotten_afterwards():
    from matplotlib.font_manager import fontManager

    with figure_font("肺炎"):
        assert FAMILY in {entry.name for entry in fontManager.ttflist}
    assert FAMILY not in {entry.name for entry in fontManager.ttflist}


@pytest.mark.parametrize("flavor", [None, "woff"])
def test_the_small_font_holds_exactly_what_is_asked_for(flavor):
    font = TTFont(io.BytesIO(small_font("骨直角 abc", flavor)))
    assert set(map(chr, font.getBestCmap())) == set("骨直角 abc")
    assert font["name"].getDebugName(1) == FAMILY


def test_a_table_that_the_subsetter_does_not_know_is_dropped_without_a_word(tmp_path, monkeypatch, caplog):
    font = TTFont(io.BytesIO(small_font("肺")))
    for tag in ("BDF ", "FFTM"):  # as in WenQuanYi
        font[tag] = DefaultTable(tag)
        font[tag].data = bytes(28)
    font.save(tmp_path / "font.otf")
    monkeypatch.setattr(fonts, "_font_files", lambda: [tmp_path / "font.otf"])
    assert set(TTFont(io.BytesIO(small_font("肺"))).keys()).isdisjoint(("BDF ", "FFTM"))
    assert not caplog.records


def test_no_font_is_made_for_what_none_can_draw():
    assert small_font("\U0010fffd") is None
    with figure_font("no Chinese at all") as families:
        assert FAMILY not in families


@pytest.mark.parametrize(
    "name", ["$x^$", r"$\frac{1}{", "a_b & c", '<script>"', "--><script>", "\\alpha", "a\nb"]
)
def test_names_are_drawn_as_they_are_written(name, tmp_path):
    with figures.style(["DejaVu Sans"]):
        for key, figure in every_figure((name, "other")).items():
            figures.save(figure, tmp_path, key)
            assert "<script" not in (tmp_path / f"{key}.svg").read_text()
            ET.parse(tmp_path / f"{key}.svg")


@pytest.mark.parametrize("classes", [CHINESE, tuple(f"a rather long name of class {i}" for i in range(30))])
def test_legends_lie_inside_the_figure(classes, tmp_path):
    with figure_font("".join(classes)) as families, figures.style(families):
        for name, figure in every_figure(classes).items():
            figures.save(figure, tmp_path, name)
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert box.min.min() >= 0, name
                assert (box.max <= figure.bbox.max).all(), name


def test_no_row_of_a_legend_is_almost_empty_and_curves_stand_in_the_middle_of_their_figure(tmp_path):
    with figure_font("".join(CHINESE)) as families, figures.style(families):
        made = every_figure(CHINESE)
        for name in ("map", "roc", "precision_recall"):
            figures.save(made[name], tmp_path, name)
    assert made["map"].legends[0]._ncols == 3  # of five words, which want two rows
    for name in ("roc", "precision_recall"):
        box, whole = made[name].axes[0].get_tightbbox(), made[name].bbox
        assert whole.x1 - box.x1 < 0.06 * whole.width, name


def test_no_name_hides_the_star_of_another_class_or_most_of_a_point():
    axes = every_figure(CHINESE)["map"].axes[0]
    stars = axes.collections[-len(CHINESE) - 1 : -1]
    assert min(star.zorder for star in stars) > max(name.zorder for name in axes.texts)
    assert all(name.get_bbox_patch().get_alpha() <= 0.5 for name in axes.texts)


def test_thirty_classes_can_be_told_apart():
    probs, labels = example(30)
    names = [f"class {i}" for i in range(30)]
    lines = figures.roc_curves(probs, labels, metrics_of(probs, labels, names)["per_class"]).axes[0].lines[1:]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 30


def test_the_drawn_curves_have_the_areas_of_scikit_learn():
    probs, labels = example(3)
    probs = probs.round(1)  # many ties
    per_class = metrics_of(probs, labels, CHINESE)["per_class"]
    roc = figures.roc_curves(probs, labels, per_class).axes[0].lines[1:]
    steps = figures.precision_recall_curves(probs, labels, per_class).axes[0].lines
    for c in range(3):
        area = np.trapezoid(roc[c].get_ydata(), roc[c].get_xdata())
        assert area == pytest.approx(roc_auc_score(labels == c, probs[:, c]))
        recall, precision = steps[c].get_xdata(), steps[c].get_ydata()
        area = (np.diff(recall) * precision[1:]).sum()
        assert area == pytest.approx(average_precision_score(labels == c, probs[:, c]))
        assert steps[c].get_drawstyle() == "steps-pre"


def test_a_class_without_images_has_no_curve():
    probs, labels = example(3)
    probs, labels = probs[labels != 1], labels[labels != 1]
    per_class = metrics_of(probs, labels, CHINESE)["per_class"]
    drawn = figures.precision_recall_curves(probs, labels, per_class).axes[0]
    assert [line.get_label().split()[0] for line in drawn.lines] == ["正常", "气胸"] and not drawn.texts


@pytest.mark.parametrize("curves", [figures.roc_curves, figures.precision_recall_curves])
def test_images_of_a_single_class_have_no_curve_and_the_figure_says_so(curves, tmp_path):
    probs, labels = example(3)
    probs, labels = probs[labels == 1], labels[labels == 1]
    figure = curves(probs, labels, metrics_of(probs, labels, CHINESE)["per_class"])
    figures.save(figure, tmp_path, "curves")
    axes = figure.axes[0]
    (text,) = axes.texts
    assert "single class" in text.get_text()
    box = text.get_window_extent()
    assert axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and box.y1 < axes.bbox.y1


def test_the_mean_over_folds_ends_where_the_shortest_fold_ends():
    axes = figures.learning_curve({"training": [[4, 2, 1], [2, 1]]}, "Loss", None).axes[0]
    thin, strong = axes.lines[:2], axes.lines[2]
    assert [line.get_ydata().tolist() for line in thin] == [[4, 2, 1], [2, 1]]
    assert strong.get_ydata().tolist() == [3, 1.5]
    assert strong.get_linewidth() > thin[0].get_linewidth()


def test_the_confusion_matrix_says_counts_and_row_percent():
    axes = figures.confusion_matrix(np.array([[3, 1], [0, 0]]), ("正常", "肺炎")).axes[0]
    assert [text.get_text() for text in axes.texts] == ["3\n75.0 %", "1\n25.0 %", "0", "0"]


def test_the_page_copy_follows_the_readers_scheme_and_the_file_does_not(tmp_path):
    with figures.style(["DejaVu Sans"]):
        figure = figures.confusion_matrix(np.array([[3, 1], [2, 4]]), ("a", "b"))
        inlined = figures.save(figure, tmp_path, "matrix")
    ET.fromstring(inlined)
    assert "prefers-color-scheme:dark" in inlined and "fill: var(--ink)" in inlined
    on_file = (tmp_path / "matrix.svg").read_text()
    assert "var(--" not in on_file and not re.search(r"https?://(?!www\.w3\.org)", on_file)


@pytest.mark.parametrize(
    "name, width, expected",
    [("abc", 3, "abc"), ("abcd", 3, "abc…"), ("肺炎", 4, "肺炎"), ("肺炎症", 5, "肺炎…"), ("a\nb", 9, "a b")],
)
def test_long_names_are_cut_by_their_width(name, width, expected):
    assert figures.short(name, width) == expected
