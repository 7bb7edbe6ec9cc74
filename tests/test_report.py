"""report.html of hand-made run folders: what it says, what it holds, and what it does without."""

import base64
import dataclasses
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from quick import a_checkpoint
from sklearn.decomposition import PCA

import evaluation.model_views as model_views
from common.errors import UserError
from common.files import read_json, write_json
from evaluation.checkpoints import write_file
from evaluation.claim import claim_items
from evaluation.metrics import full_metrics
from evaluation.report import FIGURES, main, write_report
from evaluation.report_tables import facts, images_table, temperature_table
from evaluation.report_text import cards, notes
from evaluation.results import Predictions, write_results
from evaluation.run_folder import loss_words, read_run_folder
from evaluation.trained import load_trained
from models.clip import build_clip
from training.config import Config

CHINESE = ("正常", "肺炎", "骨折")
EVIL = ("$x_1$", "<img src=x onerror=alert(1)>", "a&b \"c\" 'd'")
EPOCHS = 4


def make_images(root, classes, random):
    paths = []
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(8):
            grey = np.clip(random.normal(60 + 60 * c, 20, (40, 56)), 0, 255).astype(np.uint8)
            Image.fromarray(grey).save(root / name / f"P{c}{i // 2}_{i % 2}.png")
            paths.append(f"{name}/P{c}{i // 2}_{i % 2}.png")
    return paths, np.repeat(np.arange(len(classes)), 8)


def write_checkpoint(path, config, classes, random):
    torch.manual_seed(0)
    size = config["embed_dim"]
    model = build_clip(
        config["image_encoder_name"],
        None,
        img_size=64,
        embed_dim=size,
        temperature=0.07,
        image_weights="none",
    )
    features = torch.nn.functional.normalize(
        torch.from_numpy(random.normal(size=(len(classes), size))).float()
    )
    write_file(
        path,
        a_checkpoint(
            classes, features, model.state_dict(), config,
            epoch=EPOCHS, dataset_fingerprint="f" * 64, pretrained={"image": [], "text": ["a"]},
        ),
    )  # fmt: skip


def write_history(path, worse=0.75):
    falling = [1.0, 0.8, 0.6, 0.7]
    rising = [50.0, 75.0, 80.0, 70.0]  # best in epoch 3, last in epoch 4
    history = dict.fromkeys(("train_loss", "val_loss"), falling)
    history["train_loss_image_to_text"] = [1.0, 0.8, 0.625, worse]
    history |= dict.fromkeys(("train_acc", "val_acc", "val_balanced_acc", "val_macro_f1"), rising)
    write_json(path, history)
    return history


def make_run(root, classes, kind, **options):
    """A folder as the programs leave it. In truth 21 of 24 images are right."""
    random = np.random.default_rng(0)
    run, data = root / "运行 1", root / "data"
    run.mkdir(parents=True)
    paths, labels = make_images(data, classes, random)
    options = {"group_pattern": "^(P[0-9]+)_", "data_dir": str(data), "output_dir": str(run)} | options
    config = dataclasses.asdict(
        Config(
            **options, image_encoder_name="timm:test_resnet", text_encoder_name="bert-tiny-bytes", gpu_id=-1,
            image_weights="none", img_size=64, embed_dim=8, use_amp=False, epochs=EPOCHS,
            use_cv=kind == "cv", n_splits=2,
        )
    )  # fmt: skip
    record = config | {
        "classes": list(classes),
        "class_texts": {name: [f"这是{name}", "又一句"] for name in classes},
        "dataset_fingerprint": "0123456789abcdef" * 4,
        "images_per_class": dict.fromkeys(classes, 8),
        "hardware": "CPU",
        "versions": {"python": "3.11", "torch": "2.13"},
        "git_commit": "c0ffee",
        "changed_options": ["img_size"],
    }
    probs = np.full((24, 3), 0.1)
    probs[np.arange(24), labels] = 0.8
    wrong = [0, 9, 18]  # in both folds
    probs[wrong] = np.roll(probs[wrong], 1, axis=1)
    probs[0] = 0.02, 0.95, 0.03  # the most confident mistake
    groups = np.arange(24) // 2
    folds = np.where(groups % 2 == 0, 1, 2)
    halves = [{"val": [p for p, f in zip(paths, folds, strict=True) if f == k]} for k in (1, 2)]
    for half in halves:
        half["train"] = [p for p in paths if p not in half["val"]]
    if kind == "cv":
        for fold in (1, 2):
            (run / f"fold_{fold}").mkdir()
            write_history(run / f"fold_{fold}" / "history.json", fold / 4)
            write_checkpoint(run / f"fold_{fold}" / "checkpoint_latest.pth", config, classes, random)
        write_json(run / "cv_summary.json", {"folds": [{"fold": 1}, {"fold": 2}]})
        write_json(run / "splits.json", {"folds": halves})
    elif kind == "single":
        write_history(run / "history.json")
        write_checkpoint(run / "checkpoint_latest.pth", config, classes, random)
        write_json(run / "splits.json", {"folds": [{"train": paths, "val": paths}]})
    else:
        write_checkpoint(root / "model.pth", config, classes, random)
        keep = (
            "data_dir",
            "group_pattern",
            "classes",
            "class_texts",
            "images_per_class",
            "dataset_fingerprint",
        )
        record = {key: record[key] for key in keep} | {
            "checkpoints": [str(root / "model.pth")] * 2,
            "n_known_images": 0,
        }
    write_json(run / "config.json", record)
    predictions = Predictions(
        tuple(classes), tuple(paths), labels, probs, folds if kind == "cv" else None, groups
    )
    write_results(run, predictions, "oof_predictions.csv" if kind == "cv" else "predictions.csv")
    return run


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.words, self.css = [], [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        if self.lasttag == "style":
            self.css += data
        else:
            self.words.append(data)

    def pictures(self, kind):
        prefix = f"data:{kind};base64,"
        sources = [value for tag, key, value in self.attributes if (tag, key) == ("img", "src")]
        return [base64.b64decode(s.removeprefix(prefix)) for s in sources if s.startswith(prefix)]


def assert_self_contained(page):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        if key in ("src", "href", "srcset"):
            assert value.startswith(("data:", "#")), value[:60]
    assert "@import" not in page.css
    assert all(target.startswith("data:") for target in re.findall(r"url\(['\"]?(.{5})", page.css))
    assert not re.search(r"(https?:)?//\w", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """kind -> folder with its report, made without a warning."""
    made = {}
    for kind in ("single", "cv", "evaluation"):
        made[kind] = make_run(tmp_path_factory.mktemp(kind), CHINESE, kind)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Glyph .* missing")
            assert write_report(made[kind]) == made[kind] / "report.html"
    return made


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the single run to spoil."""
    return Path(shutil.copytree(runs["single"], tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["single", "cv", "evaluation"])
def test_the_page_is_one_file_that_loads_nothing(runs, kind):
    page = Page(runs[kind] / "report.html")
    assert_self_contained(page)
    assert "Report CJK" in page.css and "font/woff" in page.css


@pytest.mark.parametrize("kind", ["single", "cv", "evaluation"])
def test_the_page_says_the_numbers(runs, kind):
    metrics = json.loads((runs[kind] / "metrics.json").read_text())
    text = Page(runs[kind] / "report.html").text
    assert "87.5 %" in text and 100 * metrics["accuracy"]["value"] == 87.5  # 21 of 24
    accuracy = metrics["accuracy"]
    assert f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %" in text
    assert "33.3 % accuracy of always answering" in text  # three classes of eight images
    assert "24 images of 12 patients" in text and "intervals over patients" in text
    assert "No interval" not in text and "undefined" not in text
    auc = f"{metrics['macro_roc_auc']['value']:.3f}"
    assert f"Macro ROC-AUC {auc}" in text and f"macro ROC-AUC {auc} (" in text  # of the table and CLAIM
    for name in CHINESE:
        assert name in text
    assert f"{metrics['calibration']['temperature_scaling']['nll_after']:.3f}" in text
    chance = metrics["calibration"]["ece_if_calibrated"]
    assert (
        f"ECE {chance['mean']:.3f} on these images on average, and seldom more than {chance['p95']:.3f}"
        in text
    )


@pytest.mark.parametrize("kind", ["single", "cv", "evaluation"])
def test_every_figure_is_there_as_png_and_svg_and_in_the_page(runs, kind):
    expected = [name for name in FIGURES if kind != "evaluation" or not name.startswith("learning")]
    found = {path.name for path in (runs[kind] / "figures").iterdir()}
    assert found == {f"{name}.{suffix}" for name in expected for suffix in ("png", "svg")}
    page = Page(runs[kind] / "report.html")
    assert len(page.pictures("image/svg+xml")) == len(expected) - 1  # the mistakes are shown one by one
    assert len(page.pictures("image/jpeg")) == 3 * 3  # image and two heat maps of three mistakes


def test_last_and_best_epoch_stand_side_by_side_and_the_bias_is_named(runs):
    text = Page(runs["single"] / "report.html").text
    assert "Last epoch 最后 (4)" in text and "Best epoch 最佳 (3, optimistic 偏乐观)" in text
    assert "its numbers are optimistic" in text
    assert "Validation accuracy (%) 70.00 80.00" in text
    assert "as minimised 0.7000 0.6000 Training loss, image to text 0.7500 0.6250 Validation" in text
    folds = Page(runs["cv"] / "report.html").text
    assert "70.00 ± 0.00" in folds and "Best epochs by val_acc: 3, 3" in folds
    assert "Training loss, image to text 0.3750 ± 0.1768 0.6250 ± 0.0000" in folds


def test_a_patient_in_several_classes_is_why_the_patients_do_not_add_up(runs):
    said = "counts in each of them, and once in all"
    for kind, path in runs.items():
        assert said not in Page(path / "report.html").text
        folder = read_run_folder(path)
        one = dataclasses.replace(folder.predictions, groups=np.zeros(24, int))
        table, caption = images_table(dataclasses.replace(folder, predictions=one))
        assert [row[-1] for row in table["rows"]] == [1, 1, 1, 1] and said in caption, kind


def test_mistakes_come_the_most_confident_first(runs):
    for kind in runs:
        text = Page(runs[kind] / "report.html").text
        first = text.index("true 正常 (2.0 %), predicted 肺炎 (95.0 %)")
        assert text.index("正常/P00_0.png") < first < text.index("(80.0 %)", first)
        assert "All 3 misclassified images of 24." in text
        assert "(95.0\N{NO-BREAK SPACE}%)" in (runs[kind] / "report.html").read_text("utf-8")


def test_automatic_weights_are_named_as_what_they_were(runs):
    for kind in runs:
        text = Page(runs[kind] / "report.html").text
        assert "timm:test_resnet, weights: random" in text and "bert-tiny-bytes, weights: published" in text


def test_of_many_mistakes_the_twelve_most_confident_are_shown():
    probs = np.random.default_rng(0).dirichlet([1, 1, 1], size=60)
    labels = np.arange(60) % 3
    paths = tuple(map(str, range(60)))
    shown = model_views.most_confident_mistakes(Predictions(CHINESE, paths, labels, probs))
    wrong = [i for i in range(60) if max(probs[i]) != probs[i][labels[i]]]
    assert [m.path for m in shown] == [str(i) for i in sorted(wrong, key=lambda i: -max(probs[i]))[:12]]
    assert all(m.probability == max(probs[int(m.path)]) for m in shown)


def test_the_options_that_were_changed_are_named(runs):
    text = Page(runs["single"] / "report.html").text
    assert (
        "Options that differ from their defaults 与默认值不同的选项 Option 选项 Value 值 img_size 64" in text
    )
    assert "use_amp false" in text and "False" not in text
    rates = "peak learning rate 0.0001 (new layers x 10, text x 0.2), "
    assert f"batch 32, {rates}loss unicl" in text and f"batches of 32, {rates}weight decay" in text


def test_the_map_is_the_principal_plane_of_the_embeddings(runs):
    folder = read_run_folder(runs["single"])
    trained = load_trained(runs["single"] / "checkpoint_latest.pth", torch.device("cpu"))
    problems = []
    space = model_views.space_map(folder, trained, trained.class_features, 0, problems)
    images = [
        np.asarray(Image.open(folder.image(p)).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
        for p in folder.predictions.paths
    ]
    with torch.no_grad():
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        vectors = trained.model.encode_image(batch).double().numpy()
    oracle = PCA(2).fit(vectors)
    assert problems == [] and space.rows.tolist() == list(range(24))
    np.testing.assert_allclose(space.shares, oracle.explained_variance_ratio_, rtol=1e-3)
    np.testing.assert_allclose(np.abs(space.points), np.abs(oracle.transform(vectors)), atol=1e-4)
    sentences = oracle.transform(trained.class_features.double().numpy())
    np.testing.assert_allclose(np.abs(space.sentences), np.abs(sentences), atol=1e-4)


def test_heat_maps_are_asked_for_the_predicted_and_the_true_class(runs, monkeypatch):
    asked = []

    def heat_maps(model, images, class_features, targets):
        asked.append(list(targets))
        assert images.shape == (6, 3, 64, 64) and images.dtype == torch.uint8
        return np.zeros((6, 64, 64), np.float32)

    monkeypatch.setattr(model_views, "heat_maps", heat_maps)
    views = model_views.look(read_run_folder(runs["single"]))
    assert asked == [[1, 2, 0, 0, 1, 2]]
    assert {m.picture.shape for m in views.mistakes} == {m.for_label.shape for m in views.mistakes}
    assert views.mistakes[0].picture.shape == (40, 56, 3)  # the image's own shape, not the model's square


def test_columns_of_another_order_get_their_own_sentences(runs):
    folder = read_run_folder(runs["single"])
    p = folder.predictions
    turned = dataclasses.replace(p, classes=p.classes[::-1], labels=2 - p.labels, probs=p.probs[:, ::-1])
    one, other = (
        model_views.look(dataclasses.replace(folder, predictions=own)).space.sentences for own in (p, turned)
    )
    np.testing.assert_allclose(one, other[::-1])


def test_names_are_words_and_nothing_else(tmp_path):
    run = make_run(tmp_path, EVIL, "single")
    finding = {"level": "danger", "kind": "x", "message": "<b>bad</b>", "examples": ["<i>p</i>"], "count": 1}
    note = {"level": "note", "kind": "y", "message": "fine", "examples": [], "count": 0}
    write_json(run / "data_check.json", {"findings": [finding, note]})
    write_report(run)
    page = Page(run / "report.html")
    assert_self_contained(page)
    for name in (*EVIL, "<b>bad</b>", "<i>p</i>"):
        assert name in page.text
    assert "i" not in page.tags
    assert page.text.index("<b>bad</b>") < page.text.index("note 提示 fine")
    assert "The data check found 1 danger; read it before" in page.text
    for svg in (run / "figures").glob("*.svg"):
        assert "<img" not in svg.read_text()


def test_what_is_missing_is_said(run, tmp_path):
    record = json.loads((run / "config.json").read_text())
    shutil.copytree(record["data_dir"], tmp_path / "data")
    (tmp_path / "data" / "正常" / "P00_0.png").unlink()
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["macro_roc_auc"] |= {"low": None, "high": None}
    metrics["per_class"]["正常"]["precision"] = dict.fromkeys(("value", "low", "high", "method"))
    write_json(run / "metrics.json", metrics)
    write_json(run / "config.json", record | {"data_dir": str(tmp_path / "data")})
    (run / "checkpoint_latest.pth").unlink()
    write_report(run)
    page = Page(run / "report.html")
    assert "正常/P00_0.png cannot be shown" in page.text
    assert "checkpoint_latest.pth does not exist" in page.text
    assert "There is no data_check.json" in page.text
    assert "The map could not be drawn" in page.text
    assert page.text.count("No interval where all resamples") == 3  # under the cards, all measures, and CLAIM
    assert page.text.count("–: undefined") == 1  # under the classes
    assert len(page.pictures("image/jpeg")) == 2  # the pictures that are left, without heat maps
    assert not (run / "figures" / "embedding_map.png").exists()  # that of the report before


def test_an_encoder_without_heat_maps_still_shows_the_pictures(run, monkeypatch):
    def refuse(*_):
        raise UserError("no heat maps for this encoder")

    monkeypatch.setattr(model_views, "heat_maps", refuse)
    write_report(run)
    page = Page(run / "report.html")
    assert "no heat maps for this encoder" in page.text
    assert len(page.pictures("image/jpeg")) == 3


def test_images_that_are_gone_do_not_stop_the_report(run):
    record = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", record | {"data_dir": "/nowhere"})
    write_report(run)
    page = Page(run / "report.html")
    assert "no map of embeddings: 0 of 24 images can be read" in page.text
    assert page.pictures("image/jpeg") == []
    assert not (run / "figures" / "mistakes.png").exists()


def test_a_split_by_image_is_named_as_the_danger_it_is(tmp_path):
    run = make_run(tmp_path, CHINESE, "single", group_pattern=None)
    write_report(run)
    text = Page(run / "report.html").text
    assert "The split is by image. If patients have several images" in text
    assert "No patient is on both sides" not in text


def test_an_evaluation_on_the_training_images_is_named(runs, tmp_path):
    text = Page(runs["evaluation"] / "report.html").text
    assert "None of these images is, by its pixels, one that a model was trained" in text
    assert "the data are external is for the authors" in text
    assert "mean of 2 models" in text and "Learning curves" not in text
    what, how = text.index("What was evaluated"), text.index("How the model was made")
    assert what < text.index("fingerprint 0123456789abcdef") < text.index("Patients from") < how
    assert how < text.index("model.pth") and text.count("Versions 版本") == 1
    run = Path(shutil.copytree(runs["evaluation"], tmp_path / "copy"))
    record = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", record | {"n_known_images": 1})
    write_report(run)
    text = Page(run / "report.html").text
    assert re.search(r"Of these \d+ images 1 served to train or validate a model", text)
    assert "external is for the authors" not in text and "Whether patients of these images were" in text
    write_json(run / "config.json", record | {"n_known_images": 24})
    assert not any("also in training is not known" in note["en"] for note in notes(read_run_folder(run)))
    del record["n_known_images"]  # of an earlier version
    write_json(run / "config.json", record | {"images_known_to_model": False})
    write_report(run)
    text = Page(run / "report.html").text
    assert "some of these images is not known" in text and "made with some of them is not known, and" in text


def test_what_was_trained_of_epochs_that_could_end_early_is_named(tmp_path):
    run = read_run_folder(make_run(tmp_path, CHINESE, "cv", early_stopping_patience=2))
    trained_with = run.config | {"epochs": 30}
    (training,) = [words for name, words in facts(run, trained_with)["rows"] if name.startswith("Training")]
    assert training.startswith(f"at most 30 epochs (trained: {EPOCHS}, {EPOCHS}), batch ")
    (training,) = [row[1] for row in facts(run, trained_with | {"early_stopping_patience": None})["rows"]
                   if row[0].startswith("Training")]  # fmt: skip
    assert training.startswith("30 epochs, batch ")


def test_an_ensemble_of_other_encoders_is_not_described_as_its_first_model(tmp_path):
    run = make_run(tmp_path, CHINESE, "evaluation", early_stopping_patience=2)
    record = json.loads((run / "config.json").read_text())
    alike = {"image_encoder_name": "timm:test_resnet", "text_encoder_name": "bert-tiny-bytes"}
    last = alike | {"epoch": 4, "epoch_is": "last"}
    best = alike | {"epoch": 2, "epoch_is": "chosen"}
    answers = {}
    for name, models in {
        "same": [last, best],
        "other": [last, best | {"image_encoder_name": "resnet34"}],
        "unfinished": [last, last | {"epoch_is": "unfinished"}],
        "earlier": [alike, alike],
    }.items():
        write_json(run / "config.json", record | {"models": models})
        if name in ("same", "other"):  # a report is drawn for seconds
            text, is_other = Page(write_report(run)).text, name == "other"
            assert "(timm:test_resnet, bert-tiny-bytes, " in text
            assert ("image_encoder_name; what is said of training here is the first" in text) is is_other
            assert ("model.pth (resnet34, bert-tiny-bytes, epoch 2, an epoch chosen on" in text) is is_other
        folder = read_run_folder(run)
        items = claim_items(folder, record | dataclasses.asdict(Config(early_stopping_patience=2)), 3)
        answers[name] = {item.number: (item.status, item.answer) for item in items}
        for number in (9, 22, 24, 25):
            status, answer = answers[name][number]
            assert status == ("partly" if name == "other" else "answered")
            assert ("the models differ in image_encoder_name" in answer) is (name == "other")
    mixed = "1 of 2 models: the last epoch, not chosen; 1 of 2 models: an epoch chosen on"
    assert answers["same"][26][0] == "answered" and answers["same"][26][1].startswith(mixed)
    assert answers["other"][26][0] == "partly" and " Training could stop early" in answers["other"][26][1]
    assert "of a training not finished" in answers["unfinished"][26][1]
    assert answers["earlier"][26][0] == "partly" and "is not known" in answers["earlier"][26][1]


def test_the_checklist_has_44_items_and_answers_with_the_runs_facts(runs):
    answers = {}
    for kind, path in runs.items():
        folder = read_run_folder(path)
        items = claim_items(folder, None if kind == "evaluation" else folder.config, 3)
        assert [item.number for item in items] == list(range(1, 45))
        assert all((item.status == "authors") == (item.answer == "") for item in items)
        answers[kind] = {item.number: item.answer for item in items}
    assert answers["single"][20].startswith("By patient, images with identical pixels or of one name in two")
    assert "2-fold cross-validation" in answers["cv"][19] and "seed 42" in answers["cv"][19]
    assert "torch 2.13" in answers["cv"][23] and "c0ffee" in answers["cv"][23]
    assert "last epoch" in answers["single"][26]
    assert "3 of 24 images" in answers["single"][39]
    assert answers["single"][33] == "" and "24 images" in answers["evaluation"][33]
    assert answers["evaluation"][25] == ""  # no checkpoint, so nothing is known of the training
    assert answers["single"][34] == answers["single"][44] == ""
    folder = dataclasses.replace(folder, kind="single", config={**folder.config, "val_dir": "elsewhere"})
    (internal,) = (item for item in claim_items(folder, None, 3) if item.number == 32)
    assert internal.status == "partly" and "internal or external is for the authors" in internal.answer


@pytest.mark.parametrize(("kind", "count", "words"), [
    ("tiny", 2, "骨折 8); the data check has 1 finding. Evaluated"),
    ("unreadable", 1, "8); excluded: 1 unreadable image, see data_check.json; the data check has 1 finding."),
])  # fmt: skip
def test_the_checklist_counts_the_findings_and_what_was_left_out(runs, kind, count, words):
    finding = {"level": "warning", "kind": kind, "message": "m", "count": count, "examples": []}
    folder = read_run_folder(runs["single"])
    config = {**folder.config, "skip_unreadable": True}
    folder = dataclasses.replace(folder, config=config, check={"findings": [finding]})
    assert words in claim_items(folder, folder.config, 3)[34].answer


def test_the_checklist_of_an_evaluation_points_at_no_file_of_a_run(runs):
    folder = read_run_folder(runs["evaluation"])
    options = read_run_folder(runs["single"]).config
    items = claim_items(folder, options, 3)
    for number in (42, 43):
        assert "config.json" in items[number - 1].answer
        assert not re.search(r"splits\.json|history\.json|the run's folder", items[number - 1].answer)


def test_the_baseline_is_the_training_majority_of_each_fold(runs):
    folder = read_run_folder(runs["cv"])
    folds = [
        {"train": ["a/1", "a/2", "b/3"], "val": ["a/5", "b/6", "b/7"]},
        {"train": ["b/1", "b/2", "a/3"], "val": ["b/8"]},
    ]
    for shown, share, words in (
        (folds, "50.0 %", "answering each fold's most frequent training class"),
        (folds[:1], "33.3 %", "answering a"),
    ):
        card = cards(dataclasses.replace(folder, splits={"folds": shown}))[-1]
        assert card["value"] == share and card["below"].endswith(words)


@pytest.mark.parametrize(("taken", "said"), [(0, False), (1, True)])
def test_a_class_without_images_is_said_and_where_it_lowers_the_macro_f1(runs, taken, said):
    folder = read_run_folder(runs["evaluation"])
    assert not any("There are no images" in note["en"] for note in notes(folder))
    labels = [0, 0, 1, 1]
    probs = np.eye(3)[[0, 0, 1, 2 if taken else 1]]
    metrics = full_metrics(probs, labels, CHINESE, resamples=20)
    (note,) = (
        note["en"]
        for note in notes(dataclasses.replace(folder, metrics=metrics))
        if "There are no images of 骨折: balanced accuracy" in note["en"]
    )
    assert ("1 image was taken for 骨折, whose F1 therefore counts as 0" in note) is said


def test_main_says_what_takes_time_and_the_file_and_refuses_other_folders(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == ["drawing the report ...", str(run / "report.html")]
    assert main([str(tmp_path / "nothing")]) == 2
    assert main([str(tmp_path)]) == 2
    assert "metrics.json" in capsys.readouterr().err


@pytest.mark.parametrize("check", [
    [], {}, {"findings": [{"level": "danger"}]},
    {"findings": [{"level": "x", "message": "", "count": 0, "examples": []}]},
])  # fmt: skip
def test_a_damaged_data_check_is_refused(run, check):
    write_json(run / "data_check.json", check)
    with pytest.raises(UserError, match=r"data_check\.json holds no findings .* or remove it"):
        read_run_folder(run)


def test_a_splits_json_may_be_larger_than_other_files(run, monkeypatch):
    with open(run / "splits.json", "a") as file:
        file.write(" " * 10**6)
    monkeypatch.setattr(read_json, "__defaults__", (10**6,))
    assert read_run_folder(run).splits["folds"]


def test_an_evaluations_calibration_says_how_its_model_was_trained(tmp_path):
    run = make_run(tmp_path, CHINESE, "evaluation", logit_adjustment=True)
    caption = "Training made up for rare classes (unicl, logit adjustment): probabilities suppose"
    assert caption in Page(write_report(run)).text
    (tmp_path / "model.pth").unlink()
    assert caption not in Page(write_report(run)).text  # the model is not known any more


@pytest.mark.parametrize(
    ("accuracy", "words"), [(1.0, "every image is right"), (0.9, "the images do not settle one")]
)
def test_where_no_temperature_was_fitted_it_says_so_and_how_the_model_was_trained(tmp_path, accuracy, words):
    run = make_run(tmp_path, CHINESE, "evaluation", logit_adjustment=True)
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    metrics["calibration"]["temperature_scaling"] = None
    metrics["accuracy"]["value"] = accuracy
    del metrics["calibration"]["ece_if_calibrated"]  # as earlier versions wrote it
    (run / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    text = Page(write_report(run)).text
    assert f"No temperature was fitted: {words}" in text and "chance alone" not in text
    assert "Training made up for rare classes" in text


@pytest.mark.parametrize(("kind", "after", "better", "of_folds"), [
    ("cross-validation", 0.4, True, True), ("evaluation", 0.5, False, False), ("single", 0.6, False, False),
])  # fmt: skip
def test_the_temperatures_caption_says_whose_it_is_and_whether_it_helps(
    kind, after, better, of_folds, tmp_path
):
    scaling = {"temperature": 1.25} | {
        f"{key}_{when}": value
        for key in ("ece", "nll", "brier")
        for when, value in (("before", 0.5), ("after", after))
    }
    run = SimpleNamespace(kind=kind, metrics={"calibration": {"temperature_scaling": scaling}})
    _, caption = temperature_table(run, None)
    assert "fitted on all is 1.250" in caption
    assert ("not of their mean" in caption) is of_folds
    assert ("does not lower the NLL" in caption) is not better


@pytest.mark.parametrize("kind", ["single", "cv", "evaluation"])
def test_every_caption_has_its_chinese(runs, kind):
    page = (runs[kind] / "report.html").read_text("utf-8")
    captions = re.findall(r'<p class="caption">(.+?)</p>', page, re.DOTALL)
    assert len(captions) > 5
    assert [own for own in captions if own.strip() and not re.search("[\u4e00-\u9fff]", own)] == []


@pytest.mark.parametrize("evened", [False, True])
def test_captions_say_what_training_had_that_validation_had_not(runs, tmp_path, evened):
    shutil.copytree(runs["single"], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    config |= {"logit_adjustment": evened, "cutmix_prob": 0.5 * evened, "use_weighted_sampling": evened}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    html = write_report(tmp_path / "run").read_text("utf-8")
    said = "in training with weighted sampling and logit adjustment and CutMix, which validation goes without"
    assert (f"{said};" in html) is evened
    assert ("the same for training and validation" in html) is not evened
    assert ("a temperature cannot mend that" in html) is evened


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "unicl"),
        ({"use_weighted_sampling": True, "logit_adjustment_tau": 0.5}, "unicl, weighted sampling"),
        ({"logit_adjustment": True}, "unicl, logit adjustment"),
        (
            {"logit_adjustment": True, "logit_adjustment_tau": 0.5},
            "unicl, logit adjustment with tau 0.5",
        ),
    ],
)
def test_the_loss_is_named_with_what_gave_rare_classes_weight(options, words):
    assert loss_words({"loss": "unicl", **options}) == words
