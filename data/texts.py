"""Class name -> sentences, with the guide's priorities and checks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, did_you_mean, listed
from common.files import MOST_WRITTEN_BY_HAND, read_json
from data.scan import nfc

MOST_UNKNOWN = 10


def check_template(template: str, option: str = "--text-template") -> None:
    """Raises UserError unless `template` holds {class_name} and no other braces."""
    example = 'for example "这是一张{class_name}的图片"'
    if not _is_text(template):
        raise UserError(f"{option} {template!r} is not UTF-8; set the terminal to UTF-8")
    if "{class_name}" not in template:
        raise UserError(
            f"{option} {template!r} lacks {{class_name}}, so all classes would get one sentence; {example}"
        )
    rest = template.replace("{class_name}", "")
    if "{" in rest or "}" in rest:
        raise UserError(f"{option} {template!r} may hold {{class_name}} and no other braces; {example}")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes of another encoding
        return False
    return True


def _sentences_of(name: str, value: Any, source: str, problems: list[str]) -> list[str]:
    sentences = [value] if isinstance(value, str) else value
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) for s in sentences):
        problems.append(f"{source}: {name!r} must be a sentence or a list of sentences")
        return []
    if not all(s.strip() for s in sentences):
        problems.append(f"{source}: {name!r} holds an empty sentence")
    problems += [
        f"{source}: {name!r} holds {s!r}, which is no text (half a character)"
        for s in sentences
        if not _is_text(s)
    ]
    return [s.strip() for s in sentences]


def read_texts(texts_file: Path) -> tuple[dict[str, Any], str]:
    """What --class-texts-file holds, and its name for messages. Raises UserError where that is no JSON
    object. It may be a pipe, which can be read only once.
    """
    texts = read_json(texts_file, "--class-texts-file", MOST_WRITTEN_BY_HAND)
    source = f"--class-texts-file {texts_file}"
    if not isinstance(texts, dict):
        raise UserError(f'{source} must hold one JSON object such as {{"类别1": "描述1"}}')
    return texts, source


def class_sentences(
    classes: Sequence[str],
    texts: Mapping[str, Any] | None = None,
    source: str = "class texts",
    *,
    template: str | None = None,
) -> tuple[dict[str, list[str]], list[str]]:
    """Sentences for every class, and notes for the user.

    Priority: `texts`, which messages call `source` > `template` > the class name itself.
    Raises UserError when a name is no class, a sentence is empty, or two classes share a sentence.
    """
    problems: list[str] = []
    notes: list[str] = []
    if template is not None:
        check_template(template)
    by_name: dict[str, Any] = {}
    known, unknown = frozenset(classes), []
    for key, value in (texts or {}).items():
        name = nfc(str(key))
        if not _is_text(name) or "\0" in name:
            problems.append(f"{source}: {name!r} is no text (half a character, or a zero byte)")
            continue
        if name in by_name:
            problems.append(f"{source}: two keys both read {name!r}; keep one")
        by_name[name] = value
        if name not in known:
            unknown.append(name)
    for name in unknown[:MOST_UNKNOWN]:  # to look for the nearest class takes its time
        problems.append(
            f"{source}: {name!r} is no class of the data{did_you_mean(name, classes)}; "
            f"the classes are {listed(classes)}"
        )
    if len(unknown) > MOST_UNKNOWN:
        problems.append(f"{source}: {len(unknown) - MOST_UNKNOWN} more keys are no class of the data")
    sentences: dict[str, list[str]] = {}
    for name in classes:
        if name in by_name:
            sentences[name] = _sentences_of(name, by_name[name], source, problems)
        else:
            sentences[name] = [template.format(class_name=name) if template else name]
            if texts is not None:
                notes.append(f"class {name!r} is not in the class texts and uses {sentences[name][0]!r}")

    owner: dict[str, str] = {}
    for name, own in sentences.items():
        for sentence in dict.fromkeys(own):
            if sentence in owner:
                problems.append(
                    f"classes {owner[sentence]!r} and {name!r} share the sentence {sentence!r}, "
                    "so nothing could tell them apart"
                )
            owner[sentence] = name
    if problems:
        raise UserError(*problems)
    return sentences, notes
