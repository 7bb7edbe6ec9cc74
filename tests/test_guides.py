"""The documents say what the program does: the option table, all commands, JSON examples and snippets."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

import benchmarks.speed
import data.check
import data.demo
import evaluate_clip
import evaluation.report
import export_clip
import generate_class_texts
import models.clip  # noqa: F401 - it registers the encoders
import predict_clip
import test_clip_model
import train_clip
from common.errors import UserError
from common.files import write_json
from data.texts import check_template, class_sentences
from models.registry import IMAGE_ENCODERS
from training.config import FIELDS, Config, flag_of
from training.options import (
    check_options,
    make_config,
    options_from_flags,
    read_config_file,
    refuse_without_effect,
    resolve_auto,
)

ROOT = Path(__file__).resolve().parent.parent
README, GUIDE, TEXTS_GUIDE = (
    ROOT / name for name in ("README.md", "CLIP_TRAINING_GUIDE.md", "CLASS_TEXTS_GUIDE.md")
)
SEED = ROOT.parent / "shared" / "seed_guide.md"
TYPE_WORDS = {"bool": "开关", "int": "整数", "float": "小数", "str": "文本"}
guides = pytest.mark.parametrize("path", [GUIDE, TEXTS_GUIDE, SEED], ids=lambda path: path.name)
documents = pytest.mark.parametrize("path", [README, GUIDE, TEXTS_GUIDE, SEED], ids=lambda path: path.name)


def text_of(path: Path) -> str:
    if path == SEED and not path.exists():
        pytest.skip(f"{SEED} is not here")
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text_of(path), re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in body.splitlines()) for indent, body in found]


def inline_code(path: Path) -> list[str]:
    outside = re.sub(r"^( *)```.*?^\1```$", "", text_of(path), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", outside)


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
    resume = {"fixed": "固定", "same": "相同", "said": "提示", "free": "自由"}[
        FIELDS[name].metadata["on_resume"]
    ]
    return [f"`{flag_of(name)}`", f"`{name}`", TYPE_WORDS[kind], f"`{default}`", range_text(name), resume]


def test_option_table():
    text = GUIDE.read_text(encoding="utf-8")
    table = text.split("<!-- options:begin -->")[1].split("<!-- options:end -->")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    assert rows[0] == ["参数", "JSON 键", "类型", "默认值", "范围", "续训", "说明"]
    assert all(len(row) == 7 and row[6] for row in rows[2:]), (
        "each row has seven cells and explains its option"
    )
    wanted = {name: expected_cells(name) for name in FIELDS}
    have = {row[1].strip("`"): row[:6] for row in rows[2:]}
    mend = [f"| {' | '.join(cells)} | … |" for name, cells in wanted.items() if have.get(name) != cells]
    assert not mend, "rows that the table lacks or has otherwise:\n" + "\n".join(mend)
    assert list(have) == list(FIELDS) and len(rows) - 2 == len(FIELDS), (
        "one row per field, in the fields' order"
    )


# Commands


class Call(NamedTuple):
    """One command. program: a file such as train_clip.py, or a module such as data.demo."""

    variables: dict[str, str]
    program: str
    arguments: list[str]


def words_of(line: str) -> list[str]:
    """As the shell takes them, with 1 for what a variable or a sum would be."""
    return [re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", word) for word in shlex.split(line, comments=True)]


def call_of(line: str) -> Call | None:
    """None where no program of ours is called. "..." stands for more arguments."""
    words = words_of(line)
    at = [
        i
        for i, word in enumerate(words)
        if word.endswith((".py", ".sh"))
        or (words[max(i - 1, 0)] == "-m" and (ROOT / word.split(".")[0]).is_dir())
    ]
    if not at:
        return None
    before, after = words[: at[0]], words[at[0] + 1 :]
    variables = dict(word.split("=", 1) for word in before if re.match(r"[A-Z_]+=", word))
    end = next((i for i, word in enumerate(after) if word in ("|", "&&", "||", "&", ">", ">>")), len(after))
    return Call(variables, words[at[0]], [word for word in after[:end] if word != "..."])


def calls(path: Path) -> list[Call]:
    """Every call in the bash blocks and, where it begins with python, bash or a variable, inline."""
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [code for code in inline_code(path) if re.match(r"(python3?|bash|[A-Z_]+=\S*) ", code)]
    return [call for line in lines if (call := call_of(line))]


def read_training(arguments: Sequence[str]) -> None:
    typed = resolve_auto(options_from_flags(arguments))
    config = make_config(typed)
    refuse_without_effect(typed, config)
    if config.text_template:
        check_template(config.text_template)
    if config.group_pattern:
        assert re.search(config.group_pattern, "P001_1.jpg")[1] == "P001"


def read_script(arguments: Sequence[str]) -> None:
    options_from_flags(arguments)


def read_demo(arguments: Sequence[str]) -> None:
    with mock.patch.object(data.demo, "make_demo", side_effect=UserError("read")) as made:
        assert data.demo.main(list(arguments)) == 2 and made.called


def read_encoder_check(arguments: Sequence[str]) -> None:
    checks = {name: mock.Mock(return_value=(1, 1, 0.0, 0.0)) for name in ("_check_image", "_check_text")}
    added = {"tiny-conv": None}  # the guide's own example
    with mock.patch.multiple(test_clip_model, **checks), mock.patch.dict(IMAGE_ENCODERS, added):
        assert test_clip_model.main(arguments or ["resnet18"]) == 0


def read_class_texts(arguments: Sequence[str]) -> None:
    check_template(generate_class_texts.read_arguments(arguments).template)


def read_tests(arguments: Sequence[str]) -> None:
    assert not arguments


READERS: dict[str, Callable[[Sequence[str]], object]] = {
    "train_clip.py": read_training,
    "run_train_clip.sh": read_script,
    "generate_class_texts.py": read_class_texts,
    "predict_clip.py": predict_clip.read_arguments,
    "evaluate_clip.py": evaluate_clip.read_arguments,
    "export_clip.py": export_clip.read_arguments,
    "test_clip_model.py": read_encoder_check,
    "benchmarks.speed": benchmarks.speed.read_arguments,
    "data.demo": read_demo,
    "data.check": data.check.read_arguments,
    "evaluation.report": evaluation.report.read_arguments,
    "tests/run.sh": read_tests,
}
LIBRARIES_READ = {"HTTPS_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"}
_NOT_OURS = (
    "standalone", "nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "max-restarts",
    "array", "nodes", "ntasks-per-node", "gres", "requeue",
)  # fmt: skip
OF_OTHERS = {f"--{name}" for name in _NOT_OURS}  # torchrun's and Slurm's


def script_variables() -> set[str]:
    script = (ROOT / "run_train_clip.sh").read_text(encoding="utf-8")
    found = set(re.findall(r'^(\w+)="\$\{\1:-', script, re.M))
    assert {"DATA_DIR", "GPU_IDS"} <= found
    return found | set(re.findall(r"\$\{(\w+):-", (ROOT / "common" / "venv.sh").read_text(encoding="utf-8")))


def problem_with(call: Call) -> str | None:
    """What its program would say against a command, or None."""
    if call.program not in READERS:
        return "no such program"
    known = LIBRARIES_READ | (script_variables() if call.program == "run_train_clip.sh" else set())
    unknown = call.variables.keys() - known
    if unknown:
        return f"{', '.join(unknown)}: nothing reads it"
    flags = {flag_of(name): name for name in FIELDS}
    said = io.StringIO()
    try:
        for name, value in call.variables.items():
            flag = "--" + name.lower().replace("_", "-")
            if flag in flags and not isinstance(FIELDS[flags[flag]].default, bool):
                options_from_flags([flag, value])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            READERS[call.program](call.arguments)
    except SystemExit as end:
        return None if end.code == 0 and call.arguments == ["--help"] else said.getvalue()
    except (UserError, AssertionError) as error:
        return f"{error} {said.getvalue()}"
    return None


@documents
def test_commands(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = calls(path)
    programs = [call.program for call in found]
    assert "train_clip.py" in programs
    assert ("run_train_clip.sh" if path in (README, SEED, GUIDE) else "generate_class_texts.py") in programs
    wrong = [f"{call}: {problem}" for call in found if (problem := problem_with(call))]
    assert not wrong, "\n".join(wrong)


def flags_of(program: str) -> set[str]:
    """The flags that its --help shows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        READERS[program](["--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", said.getvalue()))


@documents
def test_inline_flags_and_variables(path):
    flags = {program: flags_of(program) for program in READERS if program != "tests/run.sh"}
    anywhere = OF_OTHERS.union(*flags.values())
    assert {"--data-dir", "--interactive", "--heatmaps"} <= anywhere
    wrong = []
    for code in inline_code(path):
        if name := re.match(r"([A-Z_]{2,})=", code):
            wrong += [code] if name[1] not in script_variables() | LIBRARIES_READ else []
        elif re.search(r"(^|\s)--[a-z]", code) and not code.startswith(("python", "bash", "hf ")):
            words = words_of(code)
            named = {word.split("=")[0] for word in words if word.startswith("--")}
            if not named <= flags.get(words[0], anywhere):
                wrong.append(code)
            elif words[0].startswith("--") and len(words) > 1 and named <= flags["train_clip.py"]:
                try:
                    options_from_flags(["1" if word in ("K", "M", "N", "X") else word for word in words])
                except UserError as error:
                    wrong.append(f"{code}: {error}")
    assert not wrong


@documents
def test_blocks_parse(path):
    known = {"", "bash", "python", "json", "text"}  # those in other languages would not be looked at
    assert set(re.findall(r"^ *```(.*)$", text_of(path), re.M)) <= known
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")
    for block in blocks(path, "bash") if shutil.which("bash") else ():
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr


# One command and the snippets, run


def tiny(arguments: Sequence[str], data_dir: Path, output_dir: Path) -> list[str]:
    """The arguments with the folders, the encoders and what costs time replaced."""
    own = {
        "--data-dir": str(data_dir), "--output-dir": str(output_dir),
        "--image-encoder": "resnet18", "--image-weights": "none", "--text-encoder": "bert-tiny-bytes",
        "--img-size": "32", "--embed-dim": "16", "--batch-size": "16", "--epochs": "2",
        "--num-workers": "0", "--gpu-id": "-1",
    }  # fmt: skip
    kept = [
        word for i, word in enumerate(arguments) if word not in own and arguments[max(i - 1, 0)] not in own
    ]
    return [*kept, *(word for pair in own.items() for word in pair)]


@pytest.fixture(scope="module")
def trained(class_folder, tmp_path_factory) -> Path:
    """Where the guide's first training command was given, with the results below it."""
    here = tmp_path_factory.mktemp("guide")
    command = next(call.arguments for call in calls(GUIDE) if call.program == "train_clip.py")
    output = options_from_flags(command)["output_dir"]
    assert output == "checkpoints/clip_models/my_model"
    assert train_clip.main(tiny(command, class_folder, here / output)) == 0
    return here


# JSON


@guides
def test_json_blocks(path):
    found = [json.loads(block) for block in blocks(path, "json") if "..." not in block]
    assert len(found) >= 1
    for value in found:
        entries = value if isinstance(value, list) else [value]
        for entry in entries:
            if not entry.keys() & FIELDS.keys():
                class_sentences(tuple(entry), entry)  # an example of class texts
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
    from data.scan import ImageFolder
    from data.splits import Split
    from training.cross_validation import METRICS, PREDICTIONS, fold_result, summarise
    from training.dataset import DataSet
    from training.one_split import RunResult

    labels, probs = np.array([0, 0, 1, 1]), np.full((2, 2), 0.5)
    folder = ImageFolder(tmp_path, ("a", "b"), ("a/0", "a/1", "b/0", "b/1"), labels, ())
    data = DataSet(folder, None, folder.files(), labels, None, None, None, "")
    for number, val in enumerate(([0, 2], [1, 3]), 1):
        split = Split(np.setdiff1d(np.arange(4), val), np.array(val))
        history = {key: [0.5, 0.25] for key in METRICS}
        result = RunResult(history, 1, False, probs)
        (tmp_path / f"fold_{number}").mkdir()
        write_json(tmp_path / f"fold_{number}" / "result.json", fold_result(number, split, result))
        data.predictions(split.val, probs, np.array([number] * 2)).write(
            tmp_path / f"fold_{number}" / PREDICTIONS
        )
    summary, _ = summarise(tmp_path, 2, data)

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
def test_plotting_snippet(path, trained, tmp_path):
    (snippet,) = (block for block in blocks(path, "python") if "history.json" in block)
    picture = trained / "training_history.png"
    picture.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=trained,
        env={**os.environ, "MPLBACKEND": "Agg", "MPLCONFIGDIR": str(tmp_path), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


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


def test_training_from_python(class_folder, tmp_path, monkeypatch):
    """The block runs as it stands; the training it starts is made small."""
    import training.run

    (block,) = (block for block in blocks(TEXTS_GUIDE, "python") if "class_texts=" in block)
    whole = training.run.train

    def small(config: Config, typed: dict, class_texts: dict) -> None:
        assert config == make_config(typed)
        own = options_from_flags(tiny([], class_folder, tmp_path / config.output_dir))
        whole(make_config({**typed, **own, "epochs": 1}), {**typed, **own}, class_texts=class_texts)

    monkeypatch.setattr(training.run, "train", small)
    values: dict = {}
    exec(compile(block, TEXTS_GUIDE.name, "exec"), values)
    stored = json.loads((tmp_path / values["options"]["output_dir"] / "config.json").read_text("utf-8"))
    given = {name: [own] if isinstance(own, str) else own for name, own in values["texts"].items()}
    assert stored["class_texts"] == given


@pytest.mark.parametrize("path", [GUIDE, TEXTS_GUIDE], ids=lambda path: path.name)
def test_links(path):
    """Links within a guide reach a heading; files it names by link or as its sister guide exist."""
    text = path.read_text(encoding="utf-8")
    headings = {h.strip().replace(" ", "-").lower() for h in re.findall(r"^#+ (.*)$", text, re.M)}
    for target in re.findall(r"\]\(#(.*?)\)", text):
        assert target in headings
    for name in re.findall(r"`((?:models|training|data)/\w+\.py|\w+\.(?:py|md|sh))`", text):
        assert name == "models/tiny_conv.py" or (ROOT / name).exists(), name
