"""Make a demo set of synthetic chest radiograph phantoms: drawn by formula, no patient behind any of them.

    python -m data.demo --output demo_data_synthetic

Body, exposure, noise and pose are drawn from random streams that do not know the class, so the lesion is
the only thing that tells the classes apart. Positions are in body units: x and y run from -1 to 1 over the
frame, y points down, and `side` is -1 for the lung on the left of the picture and +1 for the other.
"""

import csv
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import Parser, exit_code_of, imports
from common.errors import UserError
from common.files import read_json, why_unwritable, write_json
from common.progress import progress

with imports():
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter, ImageFont
    from PIL.PngImagePlugin import PngInfo

NORMAL, PNEUMONIA, PNEUMOTHORAX, NODULE = "正常", "肺炎", "气胸", "肺结节"
CLASSES = (NORMAL, PNEUMONIA, PNEUMOTHORAX, NODULE)
# Every block of 12 patients holds these, shuffled: lopsided as real sets are, and no class is ever missing.
BLOCK = (NORMAL,) * 4 + (PNEUMONIA,) * 3 + (PNEUMOTHORAX,) * 2 + (NODULE,) * 3
COLUMNS = ("path", "label", "group", "x0", "y0", "x1", "y1")
NOTE = "synthetic phantom, not a patient"
# The canvas shows more than the frame, so that rotating and shifting never pulls in an empty border.
SPAN = 1.3
Box = tuple[int, int, int, int]
VERSION = 1  # Raise when the pictures change: an old folder is then not taken for a new one.
README = """\
SYNTHETIC DATA. Every picture here is a phantom drawn by a program; none shows a patient.
For trying out the software only. Nothing learnt from it holds for real radiographs.
lesions.csv: path, class, patient, and the lesion's box in pixels (x1 and y1 exclusive; empty for normal).

合成数据。此处每张图像均由程序绘制，不来自任何患者。
仅用于试用软件；由其得到的任何结论都不适用于真实胸片。
lesions.csv：路径、类别、患者编号，以及病灶的像素框（不含 x1、y1；正常图像为空）。
"""


@dataclass(frozen=True)
class Lesion:
    """What and where. The five plain numbers are 0..1 within what the class allows."""

    label: str
    side: int
    along: float  # from mediastinum to chest wall
    down: float  # from apex to base
    size: float
    strength: float
    aspect: float
    texture_seed: int


def step(distance: np.ndarray, width: float) -> np.ndarray:
    """A soft edge: 0 where distance is below -3 * width, 1 above 3 * width."""
    t = np.clip(distance / (6 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def blurred(array: np.ndarray, radius: float) -> np.ndarray:
    # Pillow blurs no float images; 8 bits are enough for what is blurred here, and array is within 0..1.
    image = Image.fromarray((array * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, dtype=np.float32) / 255


def clouds(rng: np.random.Generator, side_px: int, cells: int) -> np.ndarray:
    """Smooth random field in 0..1 with about `cells` lumps along each side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.float32) / 255


class Body:
    """One patient's anatomy on a square canvas of `side_px` pixels that spans -SPAN..SPAN both ways."""

    def __init__(self, rng: np.random.Generator, side_px: int):
        self.rng, self.side_px = rng, side_px
        axis = ((np.arange(side_px) + 0.5) / side_px * 2 * SPAN - SPAN).astype(np.float32)
        self.x, self.y = np.meshgrid(axis, axis)
        self.lung_width = rng.uniform(0.68, 0.80)
        self.apex_y, self.base_y = rng.uniform(-0.84, -0.74), rng.uniform(0.42, 0.58)
        self.asymmetry = rng.uniform(0.0, 0.06)  # the lung on the right is this much narrower and lower
        self.lung_density = rng.uniform(0.17, 0.22)
        self.lungs = {side: self.draw_lung(side) for side in (-1, 1)}
        self.heart = self.draw_heart()
        self.open_lungs = {side: lung * (1 - self.heart) for side, lung in self.lungs.items()}
        self.bones = self.draw_bones()
        self.vessels = self.draw_vessels()

    def base(self, side: int) -> float:
        """The liver lifts the base on the left of the picture."""
        return self.base_y + (self.asymmetry if side == 1 else -0.02)

    def wall(self, side: int, y: np.ndarray, drop: float = 0.0) -> np.ndarray:
        """Distance of the lung's outer edge from the midline; `drop` lowers the apex."""
        apex = self.apex_y + drop
        down = np.clip((y - apex) / (self.base(side) + 0.25 - apex), 0, 1)
        width = self.lung_width - (self.asymmetry if side == 1 else 0) - 0.12
        return 0.12 + width * np.sqrt(1 - (1 - down) ** 2.6) - 0.5 * np.maximum(apex - y, 0)

    def draw_lung(self, side: int) -> np.ndarray:
        out = side * self.x
        medial = 0.10 + 0.05 * np.maximum(self.y, 0)
        dome = self.base(side) + 1.1 * (out - 0.36) ** 2 * np.where(out > 0.36, 1.3, 0.5)
        inside = step(self.wall(side, self.y) - out, 0.012) * step(out - medial, 0.02)
        return inside * step(dome - self.y, 0.012)

    def draw_bones(self) -> np.ndarray:
        """Ribs behind (steep and strong) and in front (faint), clavicles, spine."""
        spacing, top = self.rng.uniform(0.15, 0.18), self.rng.uniform(-0.92, -0.80)
        slope, strength = self.rng.uniform(0.20, 0.50), self.rng.uniform(0.04, 0.065)
        clavicle_y = self.rng.uniform(-0.70, -0.60)
        bones = np.zeros_like(self.x)
        for side in (-1, 1):
            out = side * self.x
            cage = step(self.wall(side, self.y) + 0.05 - out, 0.012) * step(out - 0.05, 0.02)
            # Below the diaphragm the abdomen drowns the ribs.
            cage *= 0.25 + 0.75 * step(self.base(side) + 0.12 - self.y, 0.05)
            for number in range(10):
                y = top + number * spacing
                behind = self.y - y - slope * (out - 0.2) ** 2 * np.sign(out - 0.2)
                front = self.y - y - 0.12 - 0.55 * (0.75 - out)
                bones += strength * cage * self.rib(behind, 0.038)
                bones += 0.5 * strength * cage * self.rib(front, 0.040) * step(out - 0.32, 0.04)
            clavicle = self.y - clavicle_y + 0.22 * (out - 0.1) - 0.10 * np.sin(out * 6)
            bones += 0.12 * self.rib(clavicle, 0.032) * step(out - 0.09, 0.01) * step(0.85 - out, 0.02)
        discs = 0.5 + 0.5 * np.cos(2 * np.pi * self.y / (0.75 * spacing))
        return bones + (0.03 + 0.03 * discs) * step(0.085 - np.abs(self.x), 0.012)

    @staticmethod
    def rib(distance: np.ndarray, half_width: float) -> np.ndarray:
        """A band with dense edges, as cortical bone has."""
        band = step(half_width - np.abs(distance), 0.006)
        return band * (0.65 + 0.35 * (distance / half_width) ** 2)

    def draw_heart(self) -> np.ndarray:
        """Heart, aortic knob and mediastinum as one soft shadow in 0..1."""
        width, height = self.rng.uniform(0.24, 0.34), self.rng.uniform(0.30, 0.40)
        tilt = self.x - 0.11 - 0.25 * (self.y - 0.25)
        heart = step(1 - np.hypot(tilt / width, (self.y - 0.24) / height), 0.04)
        knob = step(1 - np.hypot(self.x - 0.10, self.y + 0.32) / 0.10, 0.10)
        middle = step(0.13 - np.abs(self.x), 0.015)
        return 1 - (1 - heart) * (1 - knob) * (1 - middle)

    def draw_vessels(self) -> np.ndarray:
        """Lung markings: branching lines that leave the hila and thin out, on a little mottle."""
        rng, scale = self.rng, 2  # draw lines twice as large, then shrink: Pillow's lines have hard edges
        image = Image.new("L", (self.side_px * scale,) * 2)
        pen = ImageDraw.Draw(image)
        per_unit = self.side_px * scale / (2 * SPAN)
        for side in (-1, 1):
            for angle in np.linspace(-1.45, 1.45, 11) + rng.normal(0, 0.1, 11):
                branches = [(side * 0.15, -0.05 + rng.normal(0, 0.03), angle, rng.uniform(0.028, 0.038))]
                while branches:
                    x, y, angle, width = branches.pop()
                    while width > 0.006:
                        nx, ny = x + side * 0.05 * np.cos(angle), y + 0.05 * np.sin(angle)
                        ends = [(value + SPAN) * per_unit for value in (x, y, nx, ny)]
                        shade = min(int(90 + 4000 * width), 255)
                        pen.line(ends, fill=shade, width=max(1, round(width * per_unit)))
                        if rng.uniform() < 0.28 and width > 0.010:
                            branches.append((nx, ny, angle + rng.choice([-0.6, 0.6]), width * 0.7))
                        x, y, angle, width = nx, ny, angle + rng.normal(0, 0.12), width * 0.89
        image = image.resize((self.side_px,) * 2, Image.Resampling.BOX)
        lines = blurred(np.asarray(image) / 255, self.side_px / 400)
        return 0.08 * lines + 0.03 * (clouds(rng, self.side_px, 60) - 0.5)


def locate(body: Body, lesion: Lesion) -> tuple[float, float]:
    """Centre for a lesion in open lung: clear of apex, chest wall, diaphragm and heart."""
    y = body.apex_y + 0.28 + lesion.down * (body.base(lesion.side) - body.apex_y - 0.42)
    inner = 0.26 + (0.16 if lesion.side == 1 and y > 0.0 else 0.0)
    outer = float(body.wall(lesion.side, np.array(y))) - 0.11
    return lesion.side * (inner + lesion.along * max(outer - inner, 0)), y


def patchy_opacity(body: Body, lesion: Lesion) -> np.ndarray:
    cx, cy = locate(body, lesion)
    radius, stretch = 0.25 + 0.11 * lesion.size, 0.75 + 0.60 * lesion.aspect
    distance = np.hypot((body.x - cx) / stretch, (body.y - cy) * stretch) / radius
    lumps = clouds(np.random.default_rng(lesion.texture_seed), body.side_px, 22)
    ragged = distance + 0.9 * (lumps - 0.5)
    fading = np.exp(-((distance / 1.5) ** 4))
    return step(0.95 - ragged, 0.20) * fading * body.open_lungs[lesion.side]


def nodule_disc(body: Body, lesion: Lesion) -> np.ndarray:
    cx, cy = locate(body, lesion)
    radius = 0.085 + 0.035 * lesion.size
    return step(radius - np.hypot(body.x - cx, body.y - cy), 0.008)


def collapsed_lung(body: Body, lesion: Lesion) -> tuple[np.ndarray, np.ndarray]:
    """Air between chest wall and lung, widest at the apex or the side, and the pleural line, both 0..1."""
    out = lesion.side * body.x
    depth = 0.13 + 0.10 * lesion.size
    reach = -0.20 + 0.65 * lesion.down  # how far down the side the air goes, as y
    taper = np.clip((reach - body.y) / (reach - body.apex_y), 0, 1) ** 0.5
    inner = body.wall(lesion.side, body.y, drop=depth * (0.75 + 0.60 * lesion.aspect)) - depth * taper
    beyond = out - inner
    dy, dx = np.gradient(beyond, 2 * SPAN / body.side_px)
    distance = beyond / np.maximum(np.hypot(dx, dy), 1e-6)
    seen = body.open_lungs[lesion.side] * step(taper - 0.15, 0.03)
    return step(distance, 0.006) * seen, np.exp(-((distance / 0.010) ** 2)) * seen


def draw_scene(body: Body, lesion: Lesion) -> tuple[np.ndarray, np.ndarray]:
    """Return the radiograph before exposure and the lesion's mask, both (side_px, side_px), about 0..1."""
    x, y = body.x, body.y
    neck = step(0.30 - np.abs(x), 0.05)
    shoulders = step(y + 0.95 - 0.30 * np.maximum(np.abs(x) - 0.3, 0), 0.04)
    flank = body.lung_width + 0.16 + 1.5 * np.maximum(-0.25 - y, 0) ** 1.5
    body_mask = step(flank - np.abs(x), 0.012) * (1 - (1 - neck) * (1 - shoulders))
    lungs = body.lungs[-1] + body.lungs[1]
    markings, density = body.vessels, np.full_like(x, body.lung_density)
    mask = extra = np.zeros_like(x)
    if lesion.label == PNEUMONIA:
        mask = patchy_opacity(body, lesion)
        extra = (0.27 + 0.08 * lesion.strength) * mask
        markings = markings * (1 - 0.7 * mask)
    elif lesion.label == NODULE:
        mask = nodule_disc(body, lesion)
        extra = (0.44 + 0.08 * lesion.strength) * mask
    elif lesion.label == PNEUMOTHORAX:
        mask, line = collapsed_lung(body, lesion)
        extra = (0.13 + 0.05 * lesion.strength) * line
        markings = markings * (1 - mask)
        density = density - (0.13 + 0.04 * lesion.strength) * mask
    tissue = 0.56 + 0.05 * y
    field = tissue * (1 - lungs) + (density + markings) * lungs
    field = field + (tissue + 0.10 - field) * 0.85 * body.heart * step(y + 0.9, 0.05)
    trachea = step(0.045 - np.abs(x), 0.012) * step(-0.25 - y, 0.03)
    field = field + body.bones - 0.10 * trachea + extra
    return 0.03 + (field - 0.03) * body_mask, mask


def take_image(
    scene: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[Image.Image, Box | None]:
    """Pose, expose and digitise a scene. What is drawn from `rng` does not depend on the scene."""
    turn, zoom = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(0.97, 1.04)
    shift = rng.uniform(-0.03, 0.03, 2)
    gain, offset, gamma = rng.uniform(0.85, 1.15), rng.uniform(-0.05, 0.07), rng.uniform(0.80, 1.20)
    blur, noise = rng.uniform(0.2, 0.8) * size / 256, rng.uniform(0.008, 0.025)
    grain = rng.normal(0, noise, (size, size))

    # Pillow wants output pixel -> canvas pixel: rotate about the middle, then shift.
    scale = zoom * scene.shape[0] / (SPAN * size)
    cos, sin = scale * np.cos(turn), scale * np.sin(turn)
    cx, cy = scene.shape[0] / 2 * (1 + shift / SPAN)
    matrix = (cos, -sin, cx - (cos - sin) * size / 2, sin, cos, cy - (sin + cos) * size / 2)

    def posed(array: np.ndarray) -> np.ndarray:
        image = Image.fromarray(array.astype(np.float32))
        pose = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        return np.asarray(pose, dtype=np.float32)

    exposed = np.clip(posed(scene), 0, 1) ** gamma * gain + offset
    picture = blurred(np.clip(exposed, 0, 1), blur) + grain
    image = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    rows, columns = np.nonzero(posed(mask) > 0.4)
    if not len(rows):
        return image, None
    return image, (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)


def stream(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the seed and this key alone, not on how many were drawn elsewhere."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def synthetic_tile() -> Image.Image:
    """The word burnt into every picture: the same pixels in the same corner, so it tells no class apart."""
    tile = Image.new("L", (60, 13), 0)
    ImageDraw.Draw(tile).text((3, 1), "SYNTHETIC", fill=230, font=ImageFont.load_default_imagefont())
    return tile


def draw_patient(
    patient: int, size: int, seed: int, label: str | None = None
) -> Iterator[tuple[str, Image.Image, Box | None]]:
    """Yield (label, picture, box) for each image of one patient. `label` overrides the patient's own class.

    Body, lesion and exposure have separate streams: another label changes the lesion and nothing else.
    """
    order = stream(seed, 0, patient // len(BLOCK)).permutation(len(BLOCK))
    label = label or BLOCK[order[patient % len(BLOCK)]]
    body = Body(stream(seed, 1, patient), round(size * SPAN))
    lesion_rng = stream(seed, 2, patient)
    side, texture_seed = lesion_rng.choice([-1, 1]), lesion_rng.integers(2**31)
    lesion = Lesion(label, int(side), *lesion_rng.uniform(size=5), texture_seed=int(texture_seed))
    tile = synthetic_tile()
    for number in range(int(stream(seed, 3, patient).choice((2, 3, 4, 5), p=(0.3, 0.3, 0.2, 0.2)))):
        # A finding grows and shrinks a little between two images of one patient.
        now = replace(lesion, size=float(np.clip(lesion.size + lesion_rng.normal(0, 0.15), 0, 1)))
        picture, box = take_image(*draw_scene(body, now), size, stream(seed, 4, patient, number))
        picture.paste(tile, (2, size - tile.height - 2))
        yield label, picture, box


def write_set(folder: Path, patients: int, size: int, seed: int) -> None:
    info = PngInfo()
    info.add_text("Description", NOTE)
    for label in CLASSES:
        (folder / label).mkdir(parents=True)
    rows = []
    for patient in progress(range(patients), "drawing phantoms", unit="patient"):
        for number, (label, picture, box) in enumerate(draw_patient(patient, size, seed), start=1):
            group = f"P{patient + 1:03d}"
            path = f"{label}/{group}_{number}.png"
            picture.save(folder / path, pnginfo=info)
            rows.append((path, label, group, *(box or ("",) * 4)))
    # With BOM, so that Excel reads the Chinese names.
    with open(folder / "lesions.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    (folder / "README.txt").write_text(README, encoding="utf-8")
    write_json(folder / "demo.json", {"note": NOTE, "parameters": parameters(patients, size, seed)})


def parameters(patients: int, size: int, seed: int) -> dict[str, int]:
    return {"version": VERSION, "patients": patients, "size": size, "seed": seed}


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "lesions.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def holds_set(folder: Path, wanted: dict[str, int]) -> bool:
    """True when `folder` is a whole demo set made with the wanted parameters."""
    try:
        same = read_json(folder / "demo.json", "demo.json")["parameters"] == wanted
        return same and all((folder / row["path"]).is_file() for row in read_rows(folder))
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False


def make_demo(output: Path, patients: int = 120, size: int = 256, seed: int = 42) -> Path:
    """Make the demo set in `output` and return it; a finished set with the same parameters is left alone.

    Raises UserError when `output` is anything else that exists or cannot be made, and on a bad number.
    """
    problems = []
    if patients < len(BLOCK):
        problems.append(f"patients is {patients}; {len(BLOCK)} is the least that gives every class")
    if not 128 <= size <= 1024:
        problems.append(f"size is {size}; choose 128 to 1024 pixels")
    if seed < 0:
        problems.append(f"seed is {seed}; choose 0 or more")
    if problems:
        raise UserError(*problems)
    output = Path(output).absolute()
    if output.exists():
        if holds_set(output, parameters(patients, size, seed)):
            print(f"{output} already holds this demo set; left as it is")
            return output
        problem = "exists and is not a complete demo set with these parameters"
        raise UserError(f"--output {output} {problem}; remove it or choose another folder")
    if problem := why_unwritable(f"--output {output}", output.parent):
        raise UserError(problem)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Drawn beside its place and renamed at the end: a killed run leaves no half set under the real name.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent) as beside:
        draft = Path(beside) / "set"
        write_set(draft, patients, size, seed)
        os.rename(draft, output)
    return output


def run(typed: Sequence[str]) -> int:
    parser = Parser(prog="python -m data.demo", description="Draw a set of synthetic phantoms.")
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo_data_synthetic"), help="folder (default: %(default)s)")
    add("--patients", type=int, default=120, help="number of patients, 2 to 5 images each (default: 120)")
    add("--size", type=int, default=256, help="edge of the square images in pixels (default: 256)")
    add("--seed", type=int, default=42, help="the same seed gives the same images (default: 42)")
    args = parser.read(typed, required=())
    output = make_demo(args.output, args.patients, args.size, args.seed)
    rows = read_rows(output)
    images = Counter(row["label"] for row in rows)
    groups = Counter(label for label, _ in {(row["label"], row["group"]) for row in rows})
    print(f"{output}: {len(rows)} images of {sum(groups.values())} patients")
    for label in CLASSES:
        print(f"  {label}: {images[label]} images, {groups[label]} patients")
    print(f"All of them are synthetic ({NOTE}): for trying out the software only.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if argv is None else argv
    return exit_code_of(lambda: run(typed), interrupted="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
