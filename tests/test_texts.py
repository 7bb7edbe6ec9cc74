"""Sentences of the classes: priorities, fall-backs, and what is refused."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.scan import ImageFolder
from data.texts import check_template, class_sentences, read_texts
from training.config import Config
from training.dataset import sentences_and_notes

CLASSES = ("正常", "肺炎")


def refusal(*args, **options) -> UserError:
    with pytest.raises(UserError) as caught:
        class_sentences(*args, **options)
    return caught.value


@pytest.fixture
def file_of(tmp_path):
    def write(content, encoding: str = "utf-8") -> Path:
        path = tmp_path / "class_texts.json"
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_bytes(text.encode(encoding))
        return path

    return write


# ---- template


@pytest.mark.parametrize(
    "template", ["{class_name}", "这是一张{class_name}的图片", "{class_name}: {class_name}"]
)
def test_template_with_the_name_serves(template):
    check_template(template)
    sentences, notes = class_sentences(CLASSES, template=template)
    assert sentences == {name: [template.replace("{class_name}", name)] for name in CLASSES}
    assert notes == []


@pytest.mark.parametrize(
    "template", ["", "一张图片", "{}", "{0}", "{name}", "{{class_name}", "{ class_name }"]
)
def test_template_without_the_name_is_refused(template):
    with pytest.raises(UserError):
        check_template(template)


@pytest.mark.parametrize(
    "extra",
    [
        "{age}",
        "{}",
        "{0}",
        "{",
        "}",
        "{{",
        "}}",
        "{{x}}",
        "{class_name:>9}",
        "{class_name!r}",
        "{class_name.x}",
    ],
)
def test_template_with_other_braces_is_refused(extra):
    for template in (f"{{class_name}} {extra}", f"{extra} {{class_name}}"):
        with pytest.raises(UserError) as caught:
            check_template(template, "--template")
        assert str(caught.value).startswith("--template ") and "no other braces" in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{class_name!r}", "{class_name:>9}", "{class_name.__doc__}", "{{class_name}}"]
)
def test_template_takes_the_name_as_it_is(template):
    with pytest.raises(UserError):
        check_template(template)


def test_a_bad_template_is_refused_by_class_sentences():
    assert "lacks {class_name}" in str(refusal(CLASSES, template="一张图片"))


# ---- priorities


def test_file_beats_dictionary_beats_template_beats_name(file_of):
    folder = ImageFolder(Path(), CLASSES, (), np.zeros(0, np.int64), ())
    path, template = file_of({"正常": "file 正常"}), "template {class_name}"
    given = {"正常": "given 正常", "肺炎": "given 肺炎"}
    of_file = {"class_texts_file": str(path), "text_template": template}
    for own, texts, expected in (
        (of_file, given, ["file 正常", "template 肺炎"]),
        ({"text_template": template}, given, ["given 正常", "given 肺炎"]),
        ({"text_template": template}, None, ["template 正常", "template 肺炎"]),
        ({}, None, list(CLASSES)),
    ):
        sentences, notes = sentences_and_notes(Config(data_dir="d", output_dir="o", **own), folder, texts)
        assert sentences == {name: [sentence] for name, sentence in zip(CLASSES, expected, strict=True)}
        assert len(notes) == (own is of_file)


def test_sentences_come_in_the_order_of_the_classes():
    sentences, _ = class_sentences(CLASSES, {"肺炎": "b", "正常": "a"})
    assert list(sentences) == list(CLASSES)


@pytest.mark.parametrize(("template", "falls_to"), [(None, "肺炎"), ("胸片：{class_name}", "胸片：肺炎")])
def test_a_missing_class_falls_back_with_a_note(template, falls_to):
    sentences, notes = class_sentences(CLASSES, {"正常": "清晰的肺"}, template=template)
    assert sentences == {"正常": ["清晰的肺"], "肺炎": [falls_to]}
    assert len(notes) == 1 and "'肺炎'" in notes[0] and repr(falls_to) in notes[0]


def test_no_sentences_fall_back_for_every_class_with_a_note_each():
    sentences, notes = class_sentences(CLASSES, {})
    assert sentences == {name: [name] for name in CLASSES}
    assert len(notes) == 2


# ---- content


def test_lists_are_prompt_ensembles_and_blanks_are_trimmed():
    sentences, _ = class_sentences(CLASSES, {"正常": ["  清晰的肺 ", "无异常"], "肺炎": "\t片状影\n"})
    assert sentences == {"正常": ["清晰的肺", "无异常"], "肺炎": ["片状影"]}


def test_file_may_begin_with_a_bom(file_of):
    sentences, _ = class_sentences(CLASSES, *read_texts(file_of({"正常": "a", "肺炎": "b"}, "utf-8-sig")))
    assert sentences == {"正常": ["a"], "肺炎": ["b"]}


def test_an_unknown_class_is_refused_with_the_nearest(file_of):
    message = str(refusal(("Normal", "Pneumonia"), *read_texts(file_of({"pnuemonia": "x"}))))
    assert "'pnuemonia' is no class of the data (did you mean 'Pneumonia'?)" in message
    assert "the classes are Normal, Pneumonia" in message and "class_texts.json" in message


@pytest.mark.parametrize("value", [1, None, True, {}, [], {"text": "x"}, [1], ["x", None], [["x"]]])
def test_a_value_that_is_no_sentence_is_refused(value):
    expected = "'正常' must be a sentence or a list of sentences"
    assert expected in str(refusal(CLASSES, {"正常": value}))


@pytest.mark.parametrize("value", ["", " \t\n", "\u3000", ["x", ""], [" "]])
def test_an_empty_sentence_is_refused(value):
    assert "'正常' holds an empty sentence" in str(refusal(CLASSES, {"正常": value}))


@pytest.mark.parametrize("content", ["[]", '"a"', "null", "3"])
def test_a_file_that_is_no_object_is_refused(file_of, content):
    with pytest.raises(UserError, match="must hold one JSON object"):
        read_texts(file_of(content))


@pytest.mark.parametrize(
    ("texts", "template"),
    [
        ({"正常": "x", "肺炎": "x"}, None),
        ({"正常": "x", "肺炎": " x "}, None),
        ({"正常": ["x", "y"], "肺炎": ["z", "x"]}, None),
        ({"正常": "肺炎"}, None),  # the other class falls back to its own name
        ({"正常": "一张肺炎的图片"}, "一张{class_name}的图片"),
    ],
)
def test_a_sentence_of_two_classes_is_refused(texts, template):
    message = str(refusal(CLASSES, texts, template=template))
    assert "'正常'" in message and "'肺炎'" in message and "share the sentence" in message


def test_a_sentence_twice_in_one_class_is_fine():
    sentences, _ = class_sentences(CLASSES, {"正常": ["x", "x"]})
    assert sentences["正常"] == ["x", "x"]


def test_repeated_keys_are_refused(file_of):
    with pytest.raises(UserError, match="repeats the key '正常'"):
        read_texts(file_of('{"正常": "a", "正常": "b"}'))


def test_both_spellings_of_a_name_mean_the_class():
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    sentences, notes = class_sentences((composed, "b"), {decomposed: "x", "b": "y"})
    assert sentences == {composed: ["x"], "b": ["y"]} and notes == []
    both = {decomposed: "x", composed: "z", "b": "y"}
    assert "two keys both read" in str(refusal((composed, "b"), both))


def test_a_dictionary_with_keys_that_are_no_text_is_refused_not_a_crash():
    assert "'0' is no class of the data" in str(refusal(CLASSES, {0: "x"}))


def test_all_problems_are_told_at_once():
    error = refusal(CLASSES, {"肺炎症": "x", "正常": "", "肺炎": 3})
    assert len(error.problems) == 3


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_texts(tmp_path / "no.json")
