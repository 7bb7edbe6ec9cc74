"""Which recipe is better: whole cross-validations on the same folds, with tables and paired differences.

    python -m benchmarks.accuracy --data-dir xray3 --out compared --groups-file xray3.groups.csv --seeds 42 43
    python -m benchmarks.accuracy --data-dir xray3 --out screened --recipes-file rates.json --folds 1 2
    python -m benchmarks.accuracy --data-dir xray3 --out lopsided --keep Covid-19=16
    python -m benchmarks.accuracy --architecture timm:starnet_s1 rcf-global rcf-late starnet_dual_pyramid_rcf

A recipe is a name and options of train_clip.py by their JSON keys, trained by that program itself; with
"peer" it is one of benchmarks.accuracy_peers. A --recipes-file is a JSON object name -> options, where
"common" holds what all of them share. Each seed has its own folds, the same for all recipes. The numbers are
those of the last epoch, never of a chosen one.

The same command goes on where it was stopped; more seeds, folds and recipes may be added. results.md and
results.json are written anew after every run.

A difference to the first recipe is called beyond noise when two things hold: the interval of the paired
bootstrap, over patients or images, excludes 0 (other images would show it too), and so does a t-test over the
paired folds and seeds (another training would too), corrected for training sets that overlap (Nadeau & Bengio
2003) and by Holm for the number of recipes. With a single fold there is no second test, and nothing is.
"""

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import benchmarks.encoders  # noqa: F401  (enters its encoders into the registry)
import common.torchvision_compat  # noqa: F401
from benchmarks.accuracy_peers import PEERS, architecture_table
from benchmarks.accuracy_table import FoldResult, Results, write_tables
from common.cli import Parser, exit_code_of
from common.device import Hardware, choose_hardware
from common.errors import RunFailed, UserError, did_you_mean
from common.files import MOST_OF_SPLITS, MOST_WRITTEN_BY_HAND, read_json, write_json
from common.progress import progress
from data.groups import groups_from_file
from data.images import read_image
from data.scan import ImageFolder, scan_folder
from data.splits import Split, k_folds, splits_from_record
from evaluation.results import read_predictions
from models.clip import build_image_tower
from training.config import Config
from training.dataset import DataSet, patients_of, read_images, scan, splits_record_of
from training.fit import duration
from training.options import check_options, contradictions, layered
from training.outputs import FREE_ON_CONTINUE, library_versions, locked
from training.run import train

COMMON = {"text_encoder_name": "bert-tiny-bytes", "image_weights": "none"}
RECIPES = {
    f"{name}-{short}": {"image_encoder_name": encoder, **own}
    for short, encoder in (("resnet18", "resnet18"), ("rcf", "starnet_dual_pyramid_rcf"))
    for name, own in {
        "softmax": {"peer": "softmax"},
        "logistic": {"peer": "logistic"},
        "clip": {"loss": "clip"},
        "ce": {"loss": "ce"},
        "ours": {},
    }.items()
}
HISTORY, PREDICTIONS, SPLITS, RECIPE = "history.json", "predictions.csv", "splits.json", "recipe.json"
CROPPED_SIDE = 256


@dataclass(frozen=True)
class Recipe:
    """peer: a key of PEERS, or None for this program; own: the peer's own options."""

    name: str
    config: Config
    peer: str | None
    own: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """What must not change when a comparison goes on."""
        options = {k: v for k, v in asdict(self.config).items() if k not in FREE_ON_CONTINUE}
        return {"peer": self.peer, **self.own, **{k: v for k, v in options.items() if k != "random_state"}}


def make_recipe(
    name: str, options: Mapping[str, Any], common: Mapping[str, Any], base: Mapping[str, Any]
) -> Recipe:
    """`options` over `common` over `base`, each over its own preset. Raises UserError naming every mistake in
    `options`.
    """
    where, options = f"recipe {name!r}: ", dict(options)
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise UserError(f"{where}a name is letters, digits and . _ + -, since it names a folder")
    peer, own, problems = options.pop("peer", None), {}, []
    if peer is not None:
        if peer not in PEERS:
            raise UserError(
                f"{where}no peer {peer!r}{did_you_mean(str(peer), PEERS)}; peers: {', '.join(PEERS)}"
            )
        own = {key: options.pop(key, default) for key, default in PEERS[peer].own.items()}
        unused = sorted(options.keys() - PEERS[peer].options)
        problems += [f"{where}{key!r} has no effect on {peer}; leave it out" for key in unused]
        if "preset" in common:
            problems.append(
                f"{where}{peer} takes no preset; give 'preset' to the recipes that it is meant for"
            )
        problems += [
            f"{where}{key!r} must be a number, not {own[key]!r}"
            for key, default in PEERS[peer].own.items()
            if isinstance(own[key], bool) or not isinstance(own[key], (int, float, type(default)))
        ]
    fixed = sorted({**common, **options}.keys() & (base.keys() - {"epochs", "img_size", "gpu_id"}))
    problems += [f"{where}{key!r} is the same for all recipes; give it on the command line" for key in fixed]
    problems += check_options(options, where)
    if not problems:
        merged = layered(base, common, options)
        problems = [where + problem for problem in contradictions(Config(**{**merged, "output_dir": name}))]
    if problems:
        raise UserError(*problems)
    return Recipe(name, Config(**merged), peer, own)


def read_recipes(options: argparse.Namespace, base: Mapping[str, Any]) -> list[Recipe]:
    """Those of --recipes, in that order. Raises UserError naming every mistake of all of them."""
    found, common, where = RECIPES, COMMON, "the built-in recipes"
    if options.recipes_file:
        where = f"--recipes-file {options.recipes_file}"
        found = read_json(options.recipes_file, "--recipes-file", MOST_WRITTEN_BY_HAND)
        if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
            raise UserError(f'{where} must hold a JSON object such as {{"slow": {{"learning_rate": 1e-5}}}}')
        common = found.pop("common", {})
    problems = check_options(common, f"{where}, 'common': ")
    for seed in options.seeds:
        problems += check_options({**base, "random_state": seed}, "")
    if problems:
        raise UserError(*problems)
    names = options.recipes or list(found)
    problems += [f"--recipes {n}: not in {where}{did_you_mean(n, found)}" for n in names if n not in found]
    recipes = []
    for name in dict.fromkeys(name for name in names if name in found):
        try:
            recipes.append(make_recipe(name, found[name], common, base))
        except UserError as error:
            problems += error.problems
    if problems or not recipes:
        raise UserError(*(problems or [f"{where} holds no recipe"]))
    return recipes


def folds_of_seed(config: Config, folder: Path) -> tuple[DataSet, list[Split]]:
    """The images, and the folds of splits.json in `folder`, which is written where it is not there."""
    scanned, _ = scan(config)
    data = read_images(config, scanned, None, patients_of(config, scanned, None), at_least=2)
    stored = folder / SPLITS
    if not stored.exists():
        splits = k_folds(data.labels, data.groups, config.n_splits, config.random_state, scanned.classes)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(stored, splits_record_of(config, data, splits))
        return data, splits
    record = read_json(stored, "the comparison's splits.json", MOST_OF_SPLITS)
    return data, splits_from_record(
        record, stored, data.folder, data.groups, data.fingerprint, config.n_splits
    )


def run_folder(out: Path, recipe: Recipe, seed: int) -> Path:
    return out / f"seed_{seed}" / recipe.name


def refuse_changed(out: Path, recipes: Sequence[Recipe], seeds: Sequence[int]) -> None:
    """Raises UserError where a run of another recipe of this name has begun."""
    problems = []
    for recipe in recipes:
        for stored in (run_folder(out, recipe, seed) / RECIPE for seed in seeds):
            if stored.exists():
                # an option that came with a newer version had its default
                now, had = recipe.record(), {**asdict(Config()), **read_json(stored, "the recipe")}
                changed = [f"{k} {had.get(k)} there, {v} now" for k, v in now.items() if had.get(k) != v]
                problems += [f"{stored.parent} holds another recipe: {'; '.join(changed)}"] if changed else []
    if problems:
        raise UserError(*problems, "give the changed recipe another name, or use another --out")


def train_fold(recipe: Recipe, seed: int, fold: int, out: Path, hardware: Hardware) -> None:
    """Train one fold of one recipe, and leave predictions.csv in its folder last of all."""
    folder = run_folder(out, recipe, seed)
    config = replace(recipe.config, random_state=seed, output_dir=str(folder), fold=fold)
    data, splits = folds_of_seed(config, out / f"seed_{seed}")
    fold_dir = folder / f"fold_{fold}"
    if not (folder / RECIPE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECIPE, {**recipe.record(), "git_commit": library_versions()["git_commit"]})
    if recipe.peer is None:
        train(config, {})
        used, own = (
            read_json(at / SPLITS, "splits.json", MOST_OF_SPLITS) for at in (out / f"seed_{seed}", folder)
        )
        if used["folds"] != own["folds"]:
            raise UserError(f"{folder} was trained on other folds than {out / f'seed_{seed}' / SPLITS} holds")
    else:
        split, peer = splits[fold - 1], PEERS[recipe.peer]
        with locked(fold_dir):
            probs = peer.train(config, recipe.own, data, split, hardware, fold_dir, seed + fold)
            data.predictions(split.val, probs, np.full(len(split.val), fold)).write(fold_dir / PREDICTIONS)
    for checkpoint in fold_dir.glob("*.pth"):  # of a finished fold: a comparison would fill the disk
        checkpoint.unlink()


def read_results(out: Path, recipes: Sequence[Recipe], seeds: Sequence[int], folds: Sequence[int]) -> Results:
    """What is finished of `recipes`, by their names."""
    found: dict[str, list[FoldResult]] = {}
    for recipe in recipes:
        for seed in seeds:
            for fold in folds:
                folder = run_folder(out, recipe, seed) / f"fold_{fold}"
                if not (folder / PREDICTIONS).exists():
                    continue
                record = read_json(out / f"seed_{seed}" / SPLITS, "splits.json", MOST_OF_SPLITS)
                seconds = sum(read_json(folder / HISTORY, "the fold's history")["epoch_seconds"])
                one = read_predictions(folder / PREDICTIONS)
                n_train = len(record["folds"][fold - 1]["train"])
                found.setdefault(recipe.name, []).append(FoldResult(seed, fold, one, n_train, seconds / 60))
    return found


def facts_of(options: argparse.Namespace, data: DataSet, hardware: Hardware) -> str:
    """What the tables are of, in a sentence."""
    sizes = ", ".join(f"{name} {n}" for name, n in data.images_per_class().items())
    by = "patient" if options.groups_file else "image"
    crop = "" if options.border_crop is None else f", {options.border_crop:g} cropped off each edge"
    commits = {read_json(path, "the recipe")["git_commit"] for path in options.out.glob(f"seed_*/*/{RECIPE}")}
    return (
        f"{len(data.labels)} images ({sizes}){crop}; {options.n_splits} folds by {by}, of which "
        f"{', '.join(map(str, options.folds))}; seeds {', '.join(map(str, options.seeds))}; {options.epochs} "
        f"epochs at {options.img_size} px unless a recipe says otherwise; {hardware.description}; program "
        f"{', '.join(sorted(str(commit)[:12] for commit in commits))}"
    )


def run_all(options: argparse.Namespace, recipes: Sequence[Recipe]) -> int:
    """Train what is not finished, fold by fold, so that there is soon something to compare. The exit code."""
    out, seeds, folds, failures = options.out, options.seeds, options.folds, {}
    hardware = choose_hardware(options.gpu_id, True)
    refuse_changed(out, recipes, seeds)
    for encoder, size in {(recipe.config.image_encoder_name, recipe.config.img_size) for recipe in recipes}:
        build_image_tower(encoder, "none", size)  # what it refuses is better known now than hours later
    todo = [
        (recipe, seed, fold)
        for seed in seeds
        for fold in folds
        for recipe in recipes
        if not (run_folder(out, recipe, seed) / f"fold_{fold}" / PREDICTIONS).exists()
    ]
    data, _ = folds_of_seed(replace(recipes[0].config, random_state=seeds[0]), out / f"seed_{seeds[0]}")

    def written() -> str:
        results = read_results(out, recipes, seeds, folds)
        return write_tables(out, recipes[0].name, results, failures, facts_of(options, data, hardware))

    started = time.monotonic()
    for i, (recipe, seed, fold) in enumerate(todo):
        left = duration((time.monotonic() - started) / i * (len(todo) - i)) if i else "not known yet"
        print(f"\n[{i + 1}/{len(todo)}, left {left}] {recipe.name}, seed {seed}, fold {fold}", flush=True)
        if recipe.name in failures:
            print("passed over: it has failed before")
            continue
        try:
            train_fold(recipe, seed, fold, out, hardware)
        except RunFailed as error:
            failures[recipe.name] = str(error)
            print(f"failed: {error}", file=sys.stderr)
        written()
    print(f"\n{written()}\nwritten to {out / 'results.md'} and results.json")
    return 1 if failures else 0


def kept_images(folder: ImageFolder, patients: Sequence[str] | None, keep: Mapping[str, int]) -> list[int]:
    """Indices of all images, but of the classes in `keep` so many: those of the first patients, or the first
    images, of an order drawn once and for all. Raises UserError for what the folder does not hold.
    """
    problems, chosen = [], np.ones(len(folder.paths), bool)
    units = np.array(folder.paths if patients is None else patients)
    for name, n in keep.items():
        if name not in folder.classes:
            problems.append(f"--keep {name}={n}: no such class{did_you_mean(name, folder.classes)}")
            continue
        own = np.flatnonzero(folder.labels == folder.classes.index(name))
        if n > len(own):
            problems.append(f"--keep {name}={n}: there are {len(own)}")
            continue
        names = np.unique(units[own])
        rank = dict(
            zip(names[np.random.default_rng(0).permutation(len(names))], range(len(names)), strict=True)
        )
        order = sorted(own.tolist(), key=lambda i: (rank[units[i]], i))
        chosen[order[n:]] = False
    if problems:
        raise UserError(*problems)
    return np.flatnonzero(chosen).tolist()


def altered_copy(options: argparse.Namespace) -> Path:
    """OUT/data: links to the images that --keep keeps; with --border-crop not links but the central square,
    so much of the shorter side smaller at each edge, as PNGs of CROPPED_SIDE pixels under the same names.

    Raises UserError where another such copy is there.
    """
    target, record = options.out / "data", {"keep": options.keep, "border_crop": options.border_crop}
    stored = options.out / "data.json"
    if stored.exists():
        if read_json(stored, "the copy's record") != record:
            raise UserError(f"{target} was made with another --keep or --border-crop; use another --out")
        return target
    folder = scan_folder(options.data_dir)
    patients = groups_from_file(folder, Path(options.groups_file)) if options.groups_file else None
    for i in progress(kept_images(folder, patients, options.keep), "copying"):
        source, new = folder.root.absolute() / folder.paths[i], target / folder.paths[i]
        new.parent.mkdir(parents=True, exist_ok=True)
        new.unlink(missing_ok=True)  # of a copy that was not finished
        if options.border_crop is None:
            new.symlink_to(source)
            continue
        image = read_image(source)
        side = max(1, round((1 - 2 * options.border_crop) * min(image.size)))
        left, top = ((length - side) // 2 for length in image.size)
        # cropped before it is resized, which would mix in what lies outside
        image = image.crop((left, top, left + side, top + side))
        image.resize((CROPPED_SIDE, CROPPED_SIDE), Image.Resampling.BICUBIC).save(new, "PNG")
    write_json(stored, record)
    return target


def _pair(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("=")
    if not name or not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be like CLASS=16")
    return name, int(number)


def read_arguments(typed: Sequence[str]) -> argparse.Namespace:
    """The typed options. Raises UserError naming every mistake."""
    parser = Parser(prog="python -m benchmarks.accuracy", description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with one sub-folder of images per class (required)")
    add("--out", type=Path, help="folder for everything that is written (required)")
    add("--groups-file", help="CSV with columns path,group: folds by patient; without it by image")
    add("--recipes-file", type=Path, help="JSON object name -> options (default: built-in recipes)")
    add("--recipes", nargs="+", help="these alone, in this order; the first is what others are compared with")
    add("--seeds", nargs="+", type=int, default=[42], help="each with folds of its own (default: 42)")
    add("--folds", nargs="+", type=int, help="these alone, to screen (default: all)")
    add("--n-splits", type=int, default=5)
    add("--epochs", type=int, default=15)
    add("--img-size", type=int, default=128)
    add("--batch-size", type=int, default=32, help="of --architecture")
    add(
        "--keep", nargs="+", type=_pair, default=[], metavar="CLASS=N", help="so many images of these classes"
    )
    add("--border-crop", type=float, help="cut so much of the shorter side off each edge, and to a square")
    add("--gpu-id", type=int, default=0)
    add("--architecture", nargs="+", metavar="ENCODER", help="no training: sizes and speed of these encoders")
    found = parser.read(typed, [] if "--architecture" in typed else ["--data-dir", "--out"])
    found.keep, problems = dict(found.keep), []
    found.folds = found.folds or list(range(1, found.n_splits + 1))
    if not all(1 <= fold <= found.n_splits for fold in found.folds):
        problems.append(f"--folds must be between 1 and --n-splits {found.n_splits}")
    if found.border_crop is not None and not 0 <= found.border_crop < 0.5:
        problems.append(f"--border-crop must be at least 0 and below 0.5, not {found.border_crop}")
    if problems:
        raise UserError(*problems)
    return found


def main(typed: Sequence[str] | None = None) -> int:
    """Train, compare, write. Returns the exit code: 0 done, 1 a recipe failed, 2 bad input."""

    def program() -> int:
        options = read_arguments(sys.argv[1:] if typed is None else typed)
        if options.architecture:
            hardware = choose_hardware(options.gpu_id, True)
            print(f"{hardware.description}, {options.img_size} px, batch {options.batch_size}\n")
            print(architecture_table(options.architecture, options.img_size, options.batch_size, hardware))
            return 0
        base = {
            key: getattr(options, key) for key in ("groups_file", "epochs", "img_size", "n_splits", "gpu_id")
        }
        base |= {"data_dir": str(options.data_dir), "output_dir": str(options.out / "seed"), "use_cv": True}
        base |= {"save_best": False, "random_state": options.seeds[0]}
        recipes = read_recipes(options, base)
        if options.keep or options.border_crop is not None:
            copied = str(altered_copy(options))
            recipes = [replace(r, config=replace(r.config, data_dir=copied)) for r in recipes]
        return run_all(options, recipes)

    return exit_code_of(program, "what is finished is saved, and the same command continues")


if __name__ == "__main__":
    sys.exit(main())
