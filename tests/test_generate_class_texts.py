"""generate_class_texts.py: from a template, by hand at a terminal, by piped answers; nothing is ever lost."""

import codecs
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate_class_texts as program
from data.texts import class_sentences, read_texts

ROOT = Path(__file__).parent.parent
CLASSES = ("正常", "气胸", "肺炎")  # in the order of code points, as the program asks
DEFAULT = {name: f"这是一张{name}的医学图像" for name in CLASSES}


@pytest.fixture
def images(tmp_path) -> Path:
    for n_images, name in enumerate(CLASSES, 2):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(n_images):
            (tmp_path / "images" / name / f"{i}.png").touch()
    return tmp_path / "images"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "new folder" / "class_texts.json"


def command(images: Path, output: Path, *flags: str) -> list[str]:
    script = str(ROOT / "generate_class_texts.py")
    return [sys.executable, script, "--data-dir", str(images), "--output", str(output), *flags]


def run(images: Path, output: Path, *flags: str, typed: str | bytes = "") -> subprocess.CompletedProcess:
    if isinstance(typed, str):
        typed = typed.encode()
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command(images, output, *flags), input=typed, capture_output=True, env=environment)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def read(output: Path) -> dict:
    return json.loads(output.read_bytes().decode("utf-8"))


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


def test_template(images, output):
    done = run(images, output, "--template", "一张{class_name}的胸片")
    assert done.returncode == 0 and done.stderr == ""
    assert read(output) == {name: f"一张{name}的胸片" for name in CLASSES}
    assert list(read(output)) == list(CLASSES)
    assert "肺炎" in output.read_bytes().decode("utf-8"), "Chinese is readable in the file, not escaped"
    assert f"--class-texts-file '{output}'" in done.stdout


def test_default_template_gives_what_train_clip_takes(images, output):
    assert program.main(["--data-dir", str(images), "--output", str(output)]) == 0
    assert class_sentences(CLASSES, *read_texts(output)) == ({k: [v] for k, v in DEFAULT.items()}, [])


def test_starts_without_torch():
    code = "import sys, generate_class_texts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_existing_file_is_kept(images, output):
    output.parent.mkdir()
    output.write_text("mine", encoding="utf-8")
    refused(run(images, output), "--overwrite", "exists")
    refused(run(images, output, "--interactive", typed="一\n"), "--overwrite", "piped answers")
    refused(run(images, output, "--overwrite", "--template", "一样"), "{class_name}")
    refused(run(images / "正常", output, "--overwrite"), "two class folders")
    assert output.read_text(encoding="utf-8") == "mine"
    assert run(images, output, "--overwrite").returncode == 0
    assert read(output) == DEFAULT
    assert list(output.parent.iterdir()) == [output], "no temporary file is left"


def test_an_unedited_file_is_replaced_and_an_edited_one_is_not(images, output):
    assert run(images, output).returncode == 0
    again = run(images, output)
    assert again.returncode == 0 and "note: " in again.stdout and read(output) == DEFAULT
    refused(run(images, output, "--template", "胸片：{class_name}"), "--overwrite", "exists")
    done = run(images, output, "--interactive", typed="肺野清晰\n\n大片实变\n")
    assert done.returncode == 0 and "note: " in done.stdout
    edited = {"正常": "肺野清晰", "气胸": DEFAULT["气胸"], "肺炎": "大片实变"}
    assert read(output) == edited
    refused(run(images, output), "--overwrite", "exists")
    refused(run(images, output, "--interactive", typed="\n\n\n"), "--overwrite", "exists")
    assert read(output) == edited
    fewer = {name: DEFAULT[name] for name in CLASSES[:2]}  # a class was taken out by hand
    output.write_text(json.dumps(fewer), encoding="utf-8")
    refused(run(images, output), "--overwrite", "exists")


@pytest.mark.parametrize(
    "template", ["没有类别", "{class}", "{class_name", "{class_name!r}", "{class_name} {x}"]
)
def test_wrong_template(images, output, template):
    refused(run(images, output, "--template", template), "--template", "{class_name}")
    refused(run(images, output, "--interactive", "--template", template), "--template")
    assert not output.exists()


def test_wrong_options(images, output, tmp_path, capsys):
    refused(run(tmp_path / "nowhere", output), "--data-dir")
    refused(run(images, images), "is a folder", "class_texts.json")
    refused(run(images, images / "正常" / "0.png" / "texts.json"), "cannot be written")
    assert program.main(["--data-dir", str(images), "--overwrit"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True, True]
    assert "'--overwrite'" in errors[0] and "--output is required" in errors[1]
    assert program.main(["--data-dir", "", "--template=", "--output", " "]) == 2
    errors = capsys.readouterr().err.splitlines()
    wanted = [f"error: --{name} must be a non-empty text" for name in ("data-dir", "template", "output")]
    assert [line.split(",")[0] for line in errors] == wanted
    assert program.main(["--data-dir"]) == 2
    assert capsys.readouterr().err.startswith("error: argument --data-dir")


def test_piped_answers(images, output):
    """One line for each class, in the order of the classes."""
    done = run(images, output, "--interactive", typed="肺野清晰\n\n 大片实变 \n")
    assert done.returncode == 0
    assert read(output) == {"正常": "肺野清晰", "气胸": DEFAULT["气胸"], "肺炎": "大片实变"}
    for word in (
        "[1/3] 正常: 2 images; classes left after it: 2",
        "[3/3] 肺炎: 4 images; classes left after it: 0",
    ):
        assert word in done.stdout
    assert f"default: {DEFAULT['气胸']}" in done.stdout
    assert "sentence 1> 大片实变\n" in done.stdout, "prompt and answer share a line"


def test_default_follows_template(images, output):
    done = run(images, output, "--interactive", "--template", "胸片：{class_name}", typed="\n" * 3)
    assert done.returncode == 0
    assert read(output) == {name: f"胸片：{name}" for name in CLASSES}


@pytest.mark.parametrize("leave", ["q\n", "Q\n", ""])
def test_leaving_keeps_the_answers(images, output, leave):
    done = run(images, output, "--interactive", typed="肺野清晰\n胸腔积气\n" + leave)
    assert done.returncode == 1
    assert read(output) == {"正常": "肺野清晰", "气胸": "胸腔积气"}
    assert "2 of 3 classes" in done.stdout and "Still without: 肺炎" in done.stdout
    assert "To continue: python generate_class_texts.py" in done.stdout


def test_end_of_input_after_the_last_answer_is_complete(images, output):
    assert run(images, output, "--interactive", typed="\n\n大片实变").returncode == 0  # no end of line
    assert read(output)["肺炎"] == "大片实变"


def test_leaving_before_any_answer_writes_nothing(images, output):
    done = run(images, output, "--interactive", typed="q\n")
    assert done.returncode == 1 and "nothing was written" in done.stdout
    assert not output.parent.exists()
    output.parent.mkdir()
    output.write_text("mine", encoding="utf-8")
    assert run(images, output, "--interactive", "--overwrite", typed="q\n").returncode == 1
    assert output.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("一样\n一样\n\n", ["class 气胸", "class 正常 has this sentence"]),
        (f"{DEFAULT['气胸']}\n\n大片实变\n", ["class 气胸", "class 正常 has this sentence"]),
        ("清晰\n肺\x1b[D\n\n", ["class 气胸", "no text"]),
        (b"\xb7\xce\n\n\n", ["class 正常", "no text"]),  # GBK
    ],
)
def test_a_piped_line_that_cannot_be_used_ends_it(images, output, typed, words):
    """Asked again, the class would take the line of the next one."""
    refused(run(images, output, "--interactive", typed=typed), *words, "--overwrite")


@pytest.mark.parametrize("typed", ["一\n二\n三\n四\n", "双肺野清晰\n\n胸腔外带见透亮区\n\n\n", "\n\n\n\n四"])
def test_more_piped_lines_than_classes_are_refused(images, output, typed):
    refused(run(images, output, "--interactive", typed=typed), "more lines than the 3 classes", "--overwrite")


def test_an_empty_line_behind_the_last_answer_is_what_echo_adds(images, output):
    assert run(images, output, "--interactive", typed="一\n二\n三\n\n").returncode == 0
    assert list(read(output).values()) == ["一", "二", "三"]


def test_back(images, output):
    done = run(images, output, "--interactive", typed="错\nb\n对\n\n\n")
    assert done.returncode == 0 and "now: 错" in done.stdout
    assert read(output) == {**DEFAULT, "正常": "对"}


def test_a_mark_at_the_start_is_no_part_of_the_first_sentence(images, output):
    typed = b"\xef\xbb\xbf" + "清晰\r\n\r\n\r\n".encode()
    assert run(images, output, "--interactive", typed=typed).returncode == 0
    assert read(output) == {**DEFAULT, "正常": "清晰"}


# At a terminal


class Terminal:
    """The program on a pseudo-terminal: `say` types, `hear` waits for words on the screen."""

    def __init__(self, *arguments: str):
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "TERM": "dumb"},
            preexec_fn=self.take_terminal,
        )
        os.close(slave)
        self.screen, self.read_up_to = "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @staticmethod
    def take_terminal() -> None:
        """Ctrl-C reaches only the process that the terminal belongs to."""
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def say(self, text: str) -> None:
        os.write(self.master, text.encode())

    def hear(self, words: str, nudge: str = "") -> None:
        """Wait until `words` come, after what was heard before; type `nudge` where nothing comes."""
        deadline = time.monotonic() + 20
        while (found := self.screen.find(words, self.read_up_to)) < 0:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.master], [], [], min(left, 5))
            if not ready and left:
                self.say(nudge)
                continue
            assert ready, f"{words!r} never came: {self.screen!r}"
            try:
                self.screen += self.decoder.decode(os.read(self.master, 65536))
            except OSError:  # Linux's way of saying that the program has ended
                pytest.fail(f"ended without {words!r}: {self.screen!r}")
        self.read_up_to = found + len(words)

    def end(self) -> int:
        code = self.process.wait(20)
        os.close(self.master)
        return code


at_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def test_a_session_that_sigterm_ends_has_its_exit_code(images, output, monkeypatch, capsys):
    monkeypatch.setattr(program.Session, "ask", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert program.main(["--data-dir", str(images), "--output", str(output), "--interactive"]) == 143
    assert "To continue: " in capsys.readouterr().out


@at_a_terminal
def test_an_interrupted_session_goes_on_where_it_stopped(images, output):
    terminal = Terminal(*command(images, output, "--interactive"))
    terminal.hear("[1/3] 正常")
    terminal.hear("sentence 1> ")
    terminal.say("肺野清晰\n")
    terminal.hear("sentence 2> ")
    terminal.say("\x03")  # Ctrl-C
    # Python overlooks one that comes just before it begins to wait for a line; people press it again
    terminal.hear("1 of 3 classes", nudge="\x03")
    terminal.hear("To continue: ")
    assert terminal.end() == 130
    assert read(output) == {"正常": "肺野清晰"}

    terminal = Terminal(*command(images, output, "--interactive"))
    terminal.hear("has sentences for 1 of 3 classes; the 2 without come first")
    terminal.hear("[1/3] 气胸")
    terminal.hear("sentence 1> ")
    terminal.say("\n")
    terminal.hear("[2/3] 肺炎")
    terminal.hear("sentence 1> ")
    terminal.say("\n")
    terminal.hear("[3/3] 正常")
    terminal.hear("now: 肺野清晰")
    terminal.hear("sentence 1> ")
    terminal.say("\x04")  # Ctrl-D
    terminal.hear("3 classes, 3 sentences")
    assert terminal.end() == 0
    assert read(output) == {**DEFAULT, "正常": "肺野清晰"}


@at_a_terminal
def test_a_class_takes_several_sentences_and_asks_again_for_what_is_wrong(images, output):
    terminal = Terminal(*command(images, output, "--interactive"))
    for heard, said in (
        ("[1/3] 正常", "b"),
        ("[1/3] 正常", "肺野清晰"),
        ("sentence 2> ", "肺野清晰"),
        ("this class has that sentence already", "未见异常"),
        ("sentence 3> ", ""),
        ("[2/3] 气胸", "肺野清晰"),
        ("class 正常 has this sentence; write one that only fits 气胸", "胸腔积气"),
        ("sentence 2> ", ""),
        ("[3/3] 肺炎", ""),
    ):
        terminal.hear(heard)
        if not heard.startswith("sentence"):
            terminal.hear("sentence ")
        terminal.say(said + "\n")
    terminal.hear("3 classes, 4 sentences")
    assert terminal.end() == 0
    assert read(output) == {"正常": ["肺野清晰", "未见异常"], "气胸": "胸腔积气", "肺炎": DEFAULT["肺炎"]}


@at_a_terminal
@pytest.mark.parametrize(
    "content, words",
    [
        ('{"肺炎 ": "一"}', "did you mean '肺炎'"),
        ('{"肺炎": ["一", 2]}', "'肺炎' must be a sentence or a list"),
        ('{"肺炎": "一", "气胸": "一"}', "share the sentence"),
        ("[]", "no JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_spoilt_file_is_not_continued(images, output, content, words):
    output.parent.mkdir()
    output.write_text(content, encoding="utf-8")
    terminal = Terminal(*command(images, output, "--interactive"))
    terminal.hear("error: --output ")
    terminal.hear(words)
    assert terminal.end() == 2
    assert output.read_text(encoding="utf-8") == content
