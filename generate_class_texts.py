#!/usr/bin/env python3
"""Write the file of class sentences that `train_clip.py --class-texts-file` reads.

    python generate_class_texts.py --data-dir DATA --output class_texts.json
    python generate_class_texts.py --data-dir DATA --output class_texts.json --interactive

The first gives every class a sentence from a template, to be edited afterwards; the second asks for each.
"""

import argparse
import contextlib
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import Parser, exit_code_of, imports
from common.errors import UserError, listed, one_line
from common.files import MOST_WRITTEN_BY_HAND, read_json, why_unwritable, write_json
from common.stopping import exit_code

with imports():
    from data.scan import ImageFolder, nfc
    from data.shards import scan_images
    from data.texts import check_template, class_sentences

DEFAULT_TEMPLATE = "这是一张{class_name}的医学图像"
EPILOG = """\
An existing --output file is never lost by accident:
  from a template       it is refused, unless it holds just what the template gives; --overwrite replaces it
  --interactive         at a terminal its sentences are kept: classes without one are asked first, then
                        those with one, shown as the default. So an interrupted session goes on where it
                        stopped. --overwrite starts anew; the old file stays until the first answer
  --interactive, piped  it is refused, as piped answers start with the first class, unless it holds just what
                        the template gives; --overwrite starts anew

Interactive, at a terminal: Enter alone takes the default shown. Or type one or several sentences, one per
line; an empty line ends them. Piped: one line for each class, in the order of the names; an empty line takes
the default. b goes back to the class before, q leaves. Each answer is in the file at once, so nothing is lost
by q, Ctrl-D, Ctrl-C or the end of piped input. Classes not reached are not written: train_clip.py then gives
them --text-template or their name, and says so.

exit code: 0 every class has its sentence, 1 left early or not writable, 2 bad input, 130 Ctrl-C
"""


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="generate_class_texts.py", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--data-dir", help="folder with one sub-folder of images per class, or tar shards (required)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write (required)")
    parser.add_argument(
        "--template",
        default=DEFAULT_TEMPLATE,
        help=f"sentence for every class, with {{class_name}} in it (default: {DEFAULT_TEMPLATE})",
    )
    parser.add_argument("--interactive", action="store_true", help="ask for each class's sentence")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser.read(arguments, required=("--data-dir", "--output"))


def check_output(output: Path, interactive: bool) -> None:
    """Raises UserError when the file cannot be written, or when there is nobody to ask."""
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give a file such as {output / 'class_texts.json'}")
    if problem := why_unwritable(f"--output {output}", output.absolute().parent):
        raise UserError(problem)
    if interactive and sys.stdin is None:
        raise UserError("--interactive needs a terminal or piped input, and standard input is closed")


def refuse_to_lose(output: Path, unedited: dict[str, str], interactive: bool) -> None:
    """Raises UserError when `output` holds anything but `unedited`, what the template alone gives."""
    with contextlib.suppress(UserError):
        if read_json(output, "--output", MOST_WRITTEN_BY_HAND) == unedited:
            print(f"note: {output} holds what the template gives, nothing edited, so it may be replaced")
            return
    why = " and piped answers start with the first class" if interactive else ""
    raise UserError(f"--output {output} exists{why}; give another file, or --overwrite to replace it")


def stored_sentences(path: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """The sentences of an existing file. Raises UserError when it is not what train_clip.py would take."""
    stored = read_json(path, "--output", MOST_WRITTEN_BY_HAND)
    if not isinstance(stored, dict):
        raise UserError(f"--output {path} exists and holds no JSON object of class sentences")
    try:
        sentences, _ = class_sentences(classes, stored)
    except UserError as error:
        mend = "mend the file, or start anew with --overwrite"
        raise UserError(*(f"--output {path}: {problem}; {mend}" for problem in error.problems)) from None
    names = {nfc(name) for name in stored}
    return {name: own for name, own in sentences.items() if name in names}


@dataclass
class Session:
    """One round of questions. answers: class -> sentences, as far as known; written whole at every change."""

    folder: ImageFolder
    template: str
    output: Path
    answers: dict[str, list[str]] = field(default_factory=dict)

    def ask_all(self) -> None:
        """Ask class by class, those without sentences first. Raises EOFError when the user leaves."""
        classes = self.folder.classes
        order = sorted(classes, key=lambda name: name in self.answers)  # stable: class order within both
        if self.answers:
            left = len(classes) - len(self.answers)
            first = f"the {left} without come first, then these" if left else "each is shown"
            print(f"{self.output} has sentences for {len(self.answers)} of {len(classes)} classes; {first}.")
        if sys.stdin.isatty():
            print("Enter takes the default. Or type sentences, one per line; an empty line ends them.")
        else:
            print("One line for each class: its sentence, or an empty line for the default.")
        print("b = back to the class before, q = leave; what is answered is saved.")
        at = 0
        while at < len(order):
            at = max(0, at + self.ask(order[at], at + 1))
        left = "" if sys.stdin.isatty() else lines_left()
        # an empty line at the end is what echo adds; more of them were meant for something
        if left.strip() or left.count("\n") > 1:
            raise UserError(
                f"--interactive: there are more lines than the {len(order)} classes, so sentences may be in "
                f"{self.output} for the wrong ones; pipe one line for each class, with --overwrite"
            )

    def ask(self, name: str, number: int) -> int:
        """Sentences for one class: +1 to go on with the next one, -1 to go back."""
        n_classes = len(self.folder.classes)
        n_images = int((self.folder.labels == self.folder.classes.index(name)).sum())
        default = self.answers.get(name) or [self.template.format(class_name=name)]
        left = f"classes left after it: {n_classes - number}"
        images = "image" if n_images == 1 else "images"
        print(f"\n[{number}/{n_classes}] {one_line(name)}: {n_images} {images}; {left}")
        for sentence in default:
            print(f"  {'now' if name in self.answers else 'default'}: {sentence}")
        typed: list[str] = []
        while True:
            line = read_line(f"  sentence {len(typed) + 1}> ")
            if line.lower() == "q":
                raise EOFError
            if line.lower() == "b":
                return -1
            if not line and typed:
                return 1
            problem = self.problem_with(name, [line] if line else default)
            if problem and not sys.stdin.isatty():  # the next line is the next class's
                raise UserError(
                    f"--interactive: the line for class {name}: {problem}; correct it and pipe all lines "
                    "again, with --overwrite"
                )
            if problem or line in typed:
                print(f"  {problem or 'this class has that sentence already'}")
                continue
            if not line:
                self.keep(name, default)
                return 1
            typed.append(line)
            self.keep(name, typed)
            if not sys.stdin.isatty():
                return 1

    def problem_with(self, name: str, sentences: Sequence[str]) -> str | None:
        for sentence in sentences:
            if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in sentence):
                return "that holds characters that are no text"
            for other, own in self.answers.items():
                if other != name and sentence in own:
                    return f"class {other} has this sentence; write one that only fits {name}"
        return None

    def keep(self, name: str, sentences: Sequence[str]) -> None:
        self.answers[name] = list(sentences)
        ordered = {c: self.answers[c] for c in self.folder.classes if c in self.answers}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, {c: own[0] if len(own) == 1 else own for c, own in ordered.items()})


def lines_left() -> str:
    """What is piped behind the last answer."""
    print("\nall classes are answered; waiting for the end of the input", flush=True)
    try:
        return sys.stdin.read()
    except OSError:  # it cannot be read, so nothing comes
        return ""


def read_line(prompt: str) -> str:
    """One line, without blanks around it. Raises EOFError at the end. Piped lines are echoed."""
    try:
        if sys.stdin.isatty():
            return input(prompt).strip()
        print(prompt, end="", flush=True)
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {sys.stdin.encoding} text: {error.reason}") from None
    if not line:
        print("(end of input)")
        raise EOFError
    line = line.lstrip("\ufeff").strip()
    print(line.encode(errors="replace").decode())
    return line


def interactive(arguments: argparse.Namespace, folder: ImageFolder) -> int:
    """Ask for every class, and say where things stand however the user leaves. Returns the exit code."""
    session = Session(folder, arguments.template, arguments.output)
    if arguments.output.exists() and not arguments.overwrite and sys.stdin.isatty():
        session.answers = stored_sentences(arguments.output, folder.classes)
    code = 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input(); Windows has its own)
    try:
        session.ask_all()
    except (EOFError, KeyboardInterrupt) as leaving:
        print()
        code = exit_code(leaving) if isinstance(leaving, KeyboardInterrupt) else 0
    missing = [name for name in folder.classes if name not in session.answers]
    if not missing:
        report(arguments, session.answers)
        return code
    command = ["python", "generate_class_texts.py", "--data-dir", str(arguments.data_dir)]
    command += ["--output", str(arguments.output)]
    if arguments.template != DEFAULT_TEMPLATE:
        command += ["--template", arguments.template]
    done = (
        f"the sentences of {len(session.answers)} of {len(folder.classes)} classes are in {arguments.output}"
    )
    print(
        f"Left early: {done if session.answers else 'nothing was answered, so nothing was written'}.\n"
        f"Still without: {listed(missing)}. In training such a class uses --text-template or its name.\n"
        f"To continue: {shlex.join([*command, '--interactive'])}"
    )
    return code or 1


def report(arguments: argparse.Namespace, answers: dict[str, list[str]]) -> None:
    n_sentences = sum(map(len, answers.values()))
    for name, own in answers.items():
        print(f"  {one_line(name)}: {'; '.join(own)}")
    print(f"\n{arguments.output}: {len(answers)} classes, {n_sentences} sentences")
    command = ["python", "train_clip.py", "--data-dir", str(arguments.data_dir), "--output-dir", "OUTPUT"]
    print(f"To train with it: {shlex.join([*command, '--class-texts-file', str(arguments.output)])}")


def generate(typed: Sequence[str]) -> int:
    """Check everything, then ask or fill in the template. Returns the exit code (see --help)."""
    arguments = read_arguments(typed)
    check_template(arguments.template, "--template")
    check_output(arguments.output, arguments.interactive)
    folder = scan_images(arguments.data_dir)
    for note in folder.notes:
        print(f"note: {note}")
    sentences, _ = class_sentences(folder.classes, template=arguments.template)
    unedited = {name: own[0] for name, own in sentences.items()}
    goes_on = arguments.interactive and sys.stdin.isatty()
    if arguments.output.exists() and not arguments.overwrite and not goes_on:
        refuse_to_lose(arguments.output, unedited, arguments.interactive)
    if arguments.interactive:
        return interactive(arguments, folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, unedited)
    report(arguments, sentences)
    print("Sentences that say what is to be seen teach more than a template: edit the file first.")
    return 0


def main(typed: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: generate(sys.argv[1:] if typed is None else typed), "nothing was written")


if __name__ == "__main__":
    sys.exit(main())
