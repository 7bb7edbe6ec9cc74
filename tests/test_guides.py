"""The guides say what the program does: the option table, all commands, JSON examples and snippets."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import generate_class_texts
from common.files import write_json
from data.texts import check_template, class_sentences
from training.config import (
    FIELDS,
    Config,
    check_options,
    flag_of,
    make_config,
    options_from_flags,
    read_config_file,
)

ROOT = Path(__file__).resolve().parent.parent
GUIDE, TEXTS_GUIDE = ROOT / "CLIP_TRAINING_GUIDE.md", ROOT / "CLASS_TEXTS_GUIDE.md"
SEED = ROOT.parent / "shared" / "seed_guide.md"
TYPE_WORDS = {"bool": "开关", "int": "整数", "float": "小数", "str": "文本"}
guides = pytest.mark.parametrize("path", [GUIDE, TEXTS_GUIDE, SEED], ids=lambda path: path.name)


def blocks(path: Path, language: str) -> list[str]:
    if path == SEED and not path.exists():
        pytest.skip(f"{SEED} is not here")
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def commands(path: Path, program: str) -> list[list[str]]:
    """The arguments of every call of `program` in the bash blocks. "..." stands for more arguments."""
    found = []
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if program in words:
                found.append([word for word in words[words.index(program) + 1 :] if word != "..."])
    return found


# The option table


def range_text(name: str) -> str:
    metadata = FIELDS[name].metadata
    if metadata["choices"]:
        return "、".join(f"`{choice}`" for choice in metadata["choices"])
    signs = {"low": "≥", "above": ">", "high": "≤", "below": "<"}
    return "，".join(f"{signs[key]} {metadata[key]}" for key in signs if metadata[key] is not None) or "—"


def expected_cells(name: str) -> list[str]:
    default = json.dumps(FIELDS[name].default, ensure_ascii=False)
    kind = str(FIELDS[name].type if isinstance(FIELDS[name].type, str) else Config.__annotations__[name])
    kind = next(word for word in TYPE_WORDS if word in kind)
    return [f"`{flag_of(name)}`", f"`{name}`", TYPE_WORDS[kind], f"`{default}`", range_text(name)]


def test_option_table():
    text = GUIDE.read_text(encoding="utf-8")
    table = text.split("<!-- options:begin -->")[1].split("<!-- options:end -->")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert rows[0] == ["参数", "JSON 键", "类型", "默认值", "范围", "说明"]
    assert all(len(row) == 6 and row[5] for row in rows[2:]), "each row has six cells and explains its option"
    wanted = {name: expected_cells(name) for name in FIELDS}
    have = {row[1].strip("`"): row[:5] for row in rows[2:]}
    mend = [f"| {' | '.join(cells)} | … |" for name, cells in wanted.items() if have.get(name) != cells]
    assert not mend, "rows that the table lacks or has otherwise:\n" + "\n".join(mend)
    assert list(have) == list(FIELDS) and len(rows) - 2 == len(FIELDS), (
        "one row per field, in the fields' order"
    )


# Commands


@guides
def test_train_clip_commands(path):
    found = commands(path, "train_clip.py")
    assert len(found) >= 2
    for arguments in found:
        config = make_config(options_from_flags(arguments))  # raises UserError with what is wrong
        if config.text_template:
            check_template(config.text_template)
        if config.group_pattern:
            assert re.search(config.group_pattern, "P001_1.jpg")[1] == "P001"


@guides
def test_generate_class_texts_commands(path):
    found = commands(path, "generate_class_texts.py")
    assert len(found) >= 2
    for arguments in found:
        check_template(generate_class_texts.read_arguments(arguments).template)


# JSON


@guides
def test_json_blocks(path):
    found = [json.loads(block) for block in blocks(path, "json") if "..." not in block]
    assert len(found) >= 1
    for value in found:
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            if not entry.keys() & FIELDS.keys():
                class_sentences(tuple(entry), given=entry)  # an example of class texts
                continue
            options = {key: option for key, option in entry.items() if key != "name"}
            assert check_options(options, "") == []
            make_config({"data_dir": "in", "output_dir": "out", **options})


def test_example_config():
    entries = read_config_file(ROOT / "train_clip_config.json")
    encoders = ["starnet_dual_pyramid_rcf", "resnet50", "vit", "convnext-tiny"]
    assert [entry["image_encoder_name"] for entry in entries] == encoders
    keys = [list(entry) for entry in entries]
    assert all(own == keys[0] for own in keys), "every entry shows the same keys"
    for entry in entries:
        assert entry["text_encoder_name"] == "bert-base-chinese"
        make_config({"data_dir": "in", "output_dir": "out", **entry})
    if SEED.exists():
        whole = SEED.read_text(encoding="utf-8").split('  },\n  {\n    "image_encoder_name": "resnet50"')[0]
        assert keys[0] == re.findall(r'^ +"(\w+)":', whole.rsplit("[\n", 1)[1], re.M)


# What the guide says about files


def test_guide_names_what_history_and_leaderboard_hold():
    from training.state import HISTORY_KEYS

    text = GUIDE.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \|", text.split("`history.json` 的每个键")[1].split("检查点包含")[0], re.M
    )
    assert sorted(rows) == sorted(HISTORY_KEYS)


def test_guide_names_what_cv_summary_holds(tmp_path):
    from data.splits import Split
    from training.cross_validation import METRICS, PREDICTIONS, fold_result, summarise
    from training.outputs import write_csv
    from training.run import RunResult

    paths, labels, probs = ["a/0", "a/1", "b/0", "b/1"], np.array([0, 0, 1, 1]), [0.5, 0.5]
    for number, val in enumerate(([0, 2], [1, 3]), 1):
        split = Split(np.setdiff1d(np.arange(4), val), np.array(val))
        history = {key: [0.5, 0.25] for key in METRICS}
        result = RunResult(history, 1, False, 1.0, np.array([probs, probs]))
        (tmp_path / f"fold_{number}").mkdir()
        write_json(tmp_path / f"fold_{number}" / "result.json", fold_result(number, split, result))
        rows = [[paths[i], "ab"[labels[i]], number, "a", *probs] for i in val]
        header = ["path", "label", "fold", "prediction", "prob_a", "prob_b"]
        write_csv(tmp_path / f"fold_{number}" / PREDICTIONS, header, rows)
    data = SimpleNamespace(folder=SimpleNamespace(paths=paths, classes=["a", "b"]), labels=labels)
    summary = summarise(tmp_path, 2, data)

    keys, todo = set(), [summary]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            keys |= value.keys()
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    section = GUIDE.read_text(encoding="utf-8").split("`cv_summary.json` 的内容")[1].split("### 多配置")[0]
    assert sorted(key for key in keys if f"`{key}`" not in section) == []


# Python


@pytest.mark.parametrize("path", [GUIDE, SEED], ids=lambda path: path.name)
def test_plotting_snippet(path, tmp_path):
    from training.state import HISTORY_KEYS

    (snippet,) = (block for block in blocks(path, "python") if "history.json" in block)
    folder = tmp_path / "checkpoints" / "clip_models" / "my_model"
    folder.mkdir(parents=True)
    write_json(folder / "history.json", {key: [0.5, 0.4, 0.3] for key in HISTORY_KEYS})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "training_history.png").read_bytes().startswith(b"\x89PNG")


def test_new_encoder_example(tmp_path):
    import torch

    from models.clip import build_clip
    from models.registry import IMAGE_ENCODERS

    (source,) = (block for block in blocks(GUIDE, "python") if "@register(" in block)
    before = dict(IMAGE_ENCODERS)
    try:
        exec(compile(source, "models/tiny_conv.py", "exec"), types.ModuleType("tiny_conv").__dict__)
        (name,) = IMAGE_ENCODERS.keys() - before.keys()
        arguments = {"img_size": 32, "embed_dim": 8, "temperature": 0.07}
        model = build_clip(name, "bert-tiny-bytes", **arguments)
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        assert model.encode_image(images).shape == (2, 8)
        assert not model.image_tower.pretrained
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        loaded = build_clip(name, "bert-tiny-bytes", image_weights=str(tmp_path / "weights.pth"), **arguments)
        assert loaded.image_tower.pretrained == {n for n, _ in loaded.image_tower.named_parameters()}
    finally:
        IMAGE_ENCODERS.clear()
        IMAGE_ENCODERS.update(before)


def test_python_from_class_texts_guide_compiles():
    for block in blocks(TEXTS_GUIDE, "python"):
        compile(block, "guide", "exec")
    (example,) = (block for block in blocks(TEXTS_GUIDE, "python") if "class_texts=" in block)
    assignments = example.split("train(")[0].replace("from training.run import train", "")
    values: dict = {}
    exec(assignments, values)
    make_config(values["options"])
    class_sentences(tuple(values["texts"]), given=values["texts"])


@pytest.mark.parametrize("path", [GUIDE, TEXTS_GUIDE], ids=lambda path: path.name)
def test_links(path):
    """Links within a guide reach a heading; files it names by link or as its sister guide exist."""
    text = path.read_text(encoding="utf-8")
    headings = {h.strip().replace(" ", "-").lower() for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(#(.*?)\)", text):
        assert target in headings
    for name in re.findall(r"`((?:models|training|data)/\w+\.py|\w+\.(?:py|md|sh))`", text):
        assert name == "models/tiny_conv.py" or (ROOT / name).exists(), name
