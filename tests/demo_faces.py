"""How the demo's faces were made: drawn people, so that everything can be tried without a picture of anybody.

The two files in conf/demo are data and are read like any other; nothing but the tests imports this module. To make them again:

    uv run python tests/demo_faces.py
"""

import io
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "conf" / "demo"
DEMO_FILES = {"digiface": "digiface1m_000.parquet", "digi2real": "digi2real_000.parquet"}  # style -> file
DEMO_PEOPLE = {"digiface": range(180), "digi2real": range(90, 200)}  # of the files in conf/demo: 90 people are in both
DEMO_IMAGES = {"digiface": 16, "digi2real": 8}  # pictures of each person in conf/demo
DEMO_SEED = 0
# 5 MB for both files at a PSNR of 36 dB; quality 85 would already exceed the 6 MB that they may have.
DEMO_ENCODING = {"format": "webp", "quality": 80, "method": 6}

DEMO_PURPOSE = {"person": 1, "digiface": 2, "digi2real": 3}  # keys of the generators: a person, a picture in either style
# What makes a person: name -> (low, high). Lengths are in face units: 1 = about half the width of a face.
DEMO_TRAITS = {
    "width": (0.82, 1.04), "jaw": (0.5, 0.95), "chin": (1.2, 1.45), "skull": (1.12, 1.32), "square": (0.7, 1.05),
    "eye_x": (0.33, 0.45), "eye_width": (0.14, 0.23), "eye_up": (0.08, 0.15), "eye_down": (0.04, 0.1), "eye_tilt": (-0.25, 0.3),
    "iris": (0.07, 0.105), "brow_y": (0.2, 0.34), "brow_thick": (0.02, 0.1), "brow_tilt": (-0.22, 0.25), "brow_bend": (0, 0.1),
    "nose": (0.36, 0.6), "nose_width": (0.09, 0.23), "mouth_y": (0.78, 0.94), "mouth_width": (0.22, 0.42),
    "lip_up": (0.03, 0.1), "lip_down": (0.04, 0.13), "ear": (0.05, 0.2), "hairline": (-0.98, -0.68), "volume": (1.02, 1.2),
    "hair_length": (0.3, 1.5), "part": (-0.6, 0.6), "beard_y": (0.25, 0.7),
}  # fmt: skip
DEMO_SKIN = np.array([(236, 204, 182), (226, 176, 142), (205, 150, 110), (150, 100, 70), (95, 62, 48)], float)
DEMO_HAIR = np.array([(30, 26, 28), (70, 46, 32), (120, 78, 44), (205, 165, 95), (165, 75, 35), (150, 150, 155)], float)
DEMO_IRIS = np.array([(60, 38, 25), (110, 72, 38), (90, 120, 70), (80, 125, 165), (120, 130, 140)], float)
DEMO_CUTS = {  # hair style -> how its lower edge runs over the forehead, see `cap`
    "short": {"drop": 0.7, "bend": 4}, "fringe": {"drop": 0.3, "bend": 6, "wave": 0.04, "edge": -0.4},
    "parted": {"drop": 0.75, "bend": 1.2}, "long": {"drop": 0.8, "bend": 1.8}, "curly": {"drop": 0.4, "bend": 3, "wave": 0.06},
}  # fmt: skip


def demo_person(identity: int, seed: int) -> SimpleNamespace:
    """The traits of one identity: lengths within DEMO_TRAITS, RGB colours [3] in 0..255, hair, beard and marks."""
    rng = np.random.default_rng([seed, DEMO_PURPOSE["person"], identity, 0])
    person = SimpleNamespace(**{name: rng.uniform(low, high) for name, (low, high) in DEMO_TRAITS.items()})
    tone = rng.uniform(0, len(DEMO_SKIN) - 1)
    person.skin = np.array([np.interp(tone, range(len(DEMO_SKIN)), c) for c in DEMO_SKIN.T]) + rng.normal(0, 6, 3)
    person.lips = person.skin * (0.86, 0.62, 0.64) + rng.normal(0, 8, 3)
    person.hair = rng.choice(DEMO_HAIR) * rng.uniform(0.8, 1.15) + rng.normal(0, 6, 3)
    person.iris_colour = rng.choice(DEMO_IRIS) + rng.normal(0, 8, 3)
    person.cut = rng.choice(["bald", *DEMO_CUTS], p=[0.08, 0.2, 0.16, 0.2, 0.2, 0.16])
    person.beard = rng.choice(["none", "full", "moustache", "goatee"], p=[0.64, 0.14, 0.11, 0.11])
    marks = rng.choice([0, 1, 2, 24], p=[0.45, 0.25, 0.15, 0.15])  # a mole or two, or many freckles
    person.marks = rng.uniform((-0.6, 0.2), (0.6, 0.62 if marks == 24 else 1.1), (marks, 2))
    person.mark_size, person.mark_shade = (0.02, 0.78) if marks == 24 else (0.045, 0.5)
    person.curls = rng.uniform((-0.06, 0.2), (0.06, 0.34), (27, 2))
    return person


def demo_look(rng: np.random.Generator) -> SimpleNamespace:
    """What differs between two pictures of a person: pose (radians, face units), expression, light, things worn."""
    yaw, pitch, roll = np.clip(rng.normal(0, (0.16, 0.08, 0.18)), (-0.4, -0.2, -0.4), (0.4, 0.2, 0.4))
    return SimpleNamespace(
        yaw=yaw, pitch=pitch, roll=roll, scale=rng.uniform(0.31, 0.4), shift=rng.normal(0, 0.035, 2),
        smile=rng.normal(0.05, 0.04), gape=max(0.0, rng.normal(0.0, 0.05)), lids=rng.uniform(0.6, 1.1),
        brows=rng.normal(0, 0.03), gaze=rng.normal(0, 0.03), light=rng.normal(0, 0.15, 2), warmth=rng.normal(0, 0.05),
        exposure=rng.uniform(0.55, 1.25), cloth=np.full(3, rng.uniform(60, 150)),
        glasses=rng.random() < 0.1, hat=rng.random() < 0.05, scarf=rng.random() < 0.05,
    )  # fmt: skip


def lens(x: float, y: float, half: float, up: float, down: float, tilt: float = 0.0, power: float = 0.5) -> np.ndarray:
    """Points [26, 2] round what lies between two arcs over x - half .. x + half: an oval, or an eye with power 1."""
    s = np.sin(np.linspace(-math.pi / 2, math.pi / 2, 13))  # dense where an oval is steep
    arc, middle = np.clip(1 - s**2, 0, 1) ** power, y + tilt * half * s
    upper, lower = np.stack([x + half * s, middle - up * arc], 1), np.stack([x + half * s, middle + down * arc], 1)
    return np.concatenate([upper, lower[::-1]])


def outline(person: SimpleNamespace, grow: float = 1.0) -> np.ndarray:
    """Points [48, 2] of the head, from the chin over the left ear, the top and the right ear back towards the chin."""
    angle = np.linspace(-math.pi, math.pi, 48, endpoint=False)
    x, y = np.sin(angle), -np.cos(angle)
    x = np.sign(x) * np.abs(x) ** person.square * person.width * (1 - (1 - person.jaw) * np.clip(y, 0, 1) ** 2)
    return np.stack([x * grow, 0.05 + y * grow * np.where(y < 0, person.skull, person.chin)], 1)


def cap(person: SimpleNamespace, grow: float, level: float, edge: float, drop=0.0, bend=1.0, wave=0.0, part=0.0) -> np.ndarray:
    """Points [N, 2] of what covers the head down to `edge` at `part`, falling from there to `level` at the temples."""
    points = outline(person, grow)
    over = points[points[:, 1] < level]
    x = np.linspace(over[-1, 0], over[0, 0], 25)
    edge = edge + drop * np.abs(x - part) ** bend + wave * np.sin(16 * x)
    return np.concatenate([over, np.stack([x, np.minimum(edge, level)], 1)])


class Pen:
    """Draws in face units (x right, y down, origin between the eyes) on a head turned and placed as `look` says."""

    def __init__(self, image: Image.Image, look: SimpleNamespace) -> None:
        self.draw, self.look, self.unit_px = ImageDraw.Draw(image), look, look.scale * image.width
        self.centre_px = (np.array((0.5, 0.46)) + look.shift) * image.width

    def place(self, points: np.ndarray, lift: float) -> list[float]:
        """Points [N, 2] on the skin (an ellipsoid), or `lift` before it, to pixels in a row as Pillow takes them."""
        look, (x, y) = self.look, np.asarray(points, float).T
        z = 0.62 * np.sqrt(np.clip(1 - x**2 - (y - 0.15) ** 2 / 2.4, 0, 1)) + lift - 0.4
        x, y = x * math.cos(look.yaw) + z * math.sin(look.yaw), y * math.cos(look.pitch) + z * math.sin(look.pitch)
        cos, sin = math.cos(look.roll) * self.unit_px, math.sin(look.roll) * self.unit_px
        return (np.stack([x * cos - y * sin, x * sin + y * cos], 1) + self.centre_px).ravel().tolist()

    def fill(self, points: np.ndarray, colour: np.ndarray, lift: float = 0.0) -> None:
        self.draw.polygon(self.place(points, lift), tuple(np.clip(colour, 0, 255).astype(int).tolist()))

    def line(self, points: np.ndarray, colour: np.ndarray, lift: float = 0.0) -> None:
        width_px = max(2, round(0.045 * self.unit_px))
        self.draw.line(self.place(points, lift), tuple(np.clip(colour, 0, 255).astype(int).tolist()), width_px, "curve")


def draw_head(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """From the back: hair behind the head, neck, shoulders, ears, a face that is lighter to one side, a full beard."""
    if person.cut != "bald":
        pen.fill(cap(person, person.volume, 0.05, edge=0.05), person.hair * 0.8)
    if person.cut == "long":
        half = person.width * person.volume * 1.15
        pen.fill(lens(0, 0, half, 1.3, 0.3 + person.hair_length, power=0.3), person.hair * 0.8)
    if person.cut == "curly":
        for (x, y), (wobble, radius) in zip(outline(person, person.volume)[11:38], person.curls, strict=True):
            pen.fill(lens(x + wobble, y, radius, radius, radius), person.hair * (0.9 + wobble))
    pen.fill(lens(0, 1.2, 0.5, 0.5, 0.6, power=0.2), person.skin * 0.7)
    pen.fill(lens(0, 2.0, 1.7, 0.5, 0.4, power=0.4), look.cloth)
    for side in (-1, 1):
        pen.fill(lens(side * person.width, 0.12, person.ear, 0.24, 0.26), person.skin * 0.84)
    for depth, grow in enumerate((1.0, 0.94, 0.86, 0.74)):
        pen.fill(outline(person, grow) + look.light * (1 - grow), person.skin * (0.86 + 0.05 * depth))
    if person.beard == "full":
        lower = np.roll(outline(person, 1.02), 24, axis=0)
        lower = lower[lower[:, 1] > person.beard_y]
        inner = lens(0, person.beard_y, person.width * 0.8, 0, person.mouth_y - person.beard_y - 0.12)[13:]
        pen.fill(np.concatenate([lower, inner[::-1]]), person.hair * 0.85 + person.skin * 0.1)


def draw_eyes(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """Socket, white, iris, pupil, upper lid and brow of each eye; a lowered lid covers the iris."""
    up, down, thick = person.eye_up * look.lids, person.eye_down, person.brow_thick
    bend = person.brow_bend + thick
    for side in (-1, 1):
        x, tilt = side * person.eye_x, -side * person.eye_tilt
        pen.fill(lens(x, 0, person.eye_width * 1.2, up + 0.06, down + 0.04, tilt), person.skin * 0.82)
        pen.fill(lens(x, 0, person.eye_width, up, down, tilt, power=1), np.array((240, 238, 234)))
        for radius, colour in ((person.iris, person.iris_colour), (person.iris * 0.5, person.iris_colour * 0.15)):
            pen.fill(lens(x + look.gaze, 0, radius, min(radius, up), min(radius, down)), colour)
        pen.line(lens(x, 0, person.eye_width * 1.05, up, down, tilt, power=1)[:13], person.hair * 0.3)
        y, tilt = -person.brow_y - look.brows, side * person.brow_tilt
        pen.fill(lens(x * 1.05, y, person.eye_width * 1.4, bend, thick - bend, tilt, 0.6), person.hair * 0.75)


def draw_nose_and_mouth(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """Moles or freckles, a nose that stands out from the face, whiskers, and lips that smile and part."""
    tip, wing = person.nose, person.nose_width
    mouth, half = person.mouth_y - look.smile * 0.7, person.mouth_width * (1 + look.smile)
    for x, y in person.marks:
        pen.fill(lens(x, y, person.mark_size, person.mark_size, person.mark_size), person.skin * person.mark_shade)
    for side, shade in ((1, 0.9), (-1, 1.04)):
        pen.fill([(0, -0.05), (side * 0.06, 0), (side * wing, tip), (0, tip + 0.04)], person.skin * shade, 0.1)
    pen.fill(lens(0, tip, wing, 0.09, 0.08), person.skin * 0.94, 0.14)
    for side in (-1, 1):
        pen.fill(lens(side * wing * 0.5, tip + 0.05, wing * 0.25, 0.02, 0.02), person.skin * 0.5, 0.12)
    if person.beard == "goatee":
        pen.fill(lens(0, person.chin - 0.08, 0.25, person.chin - mouth - 0.2, 0.12), person.hair * 0.85)
    if person.beard in ("goatee", "moustache", "full"):
        pen.fill(lens(0, mouth - 0.02, half * 1.25, 0.16, -0.04, power=0.7), person.hair * 0.85)
    low = look.smile + look.gape  # the middle of the lower lip's upper edge
    pen.fill(lens(0, mouth, half * 0.95, -look.smile, low, power=1), np.array((70, 22, 26)))
    pen.fill(lens(0, mouth, half * 0.8, -look.smile, min(low, look.smile + 0.06), power=1), np.array((235, 230, 222)))
    pen.fill(lens(0, mouth, half, person.lip_up - look.smile, look.smile + 0.01, power=1), person.lips * 0.9)
    pen.fill(lens(0, mouth, half, -low, low + person.lip_down, power=1), person.lips)


def draw_over(pen: Pen, person: SimpleNamespace, look: SimpleNamespace) -> None:
    """What lies over the face: hair on the forehead, glasses, hat, scarf."""
    if person.cut != "bald":
        cut = {"edge": person.hairline, "part": person.part if person.cut in ("parted", "long") else 0.0}
        pen.fill(cap(person, person.volume, 0.05, **cut | DEMO_CUTS[person.cut]), person.hair)
    rim = look.cloth * 0.4
    if look.glasses:
        for side in (-1, 1):
            pen.line(lens(side * 0.4, 0.02, 0.29, 0.24, 0.24, power=0.3), rim, 0.1)
            pen.line([(side * 0.69, 0), (side * person.width, -0.03)], rim, 0.1)
        pen.line([(-0.11, 0), (0.11, 0)], rim, 0.12)
    if look.hat:
        pen.fill(cap(person, person.volume + 0.06, -0.5, -0.5), look.cloth)
        pen.fill(lens(0, -0.5, person.width * 1.1, 0.1, 0.1), look.cloth * 0.7, 0.1)
    if look.scarf:
        pen.fill(lens(0, 1.5, 1.25, 0.42, 0.5, power=0.3), 255 - look.cloth, 0.1)


def light_up(image: Image.Image, look: SimpleNamespace, style: str, rng: np.random.Generator) -> Image.Image:
    """Light from one side, its warmth and the exposure; a photograph also has blur, paler colours, a vignette, noise."""
    if style == "digi2real":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.1)))
    x, y = np.meshgrid(*[np.linspace(-1, 1, image.width, dtype=np.float32)] * 2)
    shade = look.exposure * np.clip(1 + look.light[0] * x + look.light[1] * y, 0.3, 1.8)
    pixels = np.asarray(image, np.float32) * shade[..., None] * np.float32([1 + look.warmth, 1, 1 - look.warmth])
    if style == "digi2real":
        pixels = 0.8 * pixels + 0.2 * pixels.mean(axis=2, keepdims=True) + np.float32([10, 6, 0])
        pixels *= (1.05 - 0.15 * (x**2 + y**2))[..., None]
        pixels += rng.normal(0, rng.uniform(2, 6), (*x.shape, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_face(identity: int, variation: int, style: str, seed: int, size: int = 112) -> Image.Image:
    """Picture number `variation` of a person, RGB, eyes at 46 % of the height; style is "digiface" or "digi2real".

    A function of its arguments alone: the same person whatever the style, the same picture whatever else is drawn.
    """
    rng = np.random.default_rng([seed, DEMO_PURPOSE[style], identity, variation])
    person, look = demo_person(identity, seed), demo_look(rng)
    cells = 2 if style == "digiface" else 7  # a plain gradient, or blobs of colour
    backdrop = rng.uniform(90, 150) + rng.normal(0, 6, 3) + rng.normal(0, 12, (cells, cells, 1))
    image = Image.fromarray(np.clip(backdrop, 0, 255).astype(np.uint8))
    image = image.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)  # drawn twice as large, for smooth edges
    pen = Pen(image, look)
    for draw in (draw_head, draw_eyes, draw_nose_and_mouth, draw_over):
        draw(pen, person, look)
    return light_up(image.reduce(2), look, style, rng)


def write_faces(path: Path, style: str, people: Iterable[int], images: int, encoding: dict, size: int, seed: int) -> None:
    """Write pictures 0 .. `images` - 1 of each of `people`, encoded by Pillow with `encoding`, in the shape of the real data."""
    suffix = {"jpeg": "jpg"}.get(encoding["format"], encoding["format"])
    rows = []
    for i, k in tqdm([(i, k) for i in people for k in range(images)], path.name, unit="image", mininterval=1.0):
        encoded = io.BytesIO()
        draw_face(i, k, style, seed, size).save(encoded, **encoding)
        rows.append({"identity_id": str(i), "image_filename": f"{i}/{k}.{suffix}", "image_bytes": encoded.getvalue()})
    pq.write_table(
        pa.Table.from_pylist(rows), path, row_group_size=100, compression="none", use_dictionary=["identity_id"],
        write_statistics=["identity_id", "image_filename"], write_page_checksum=True,
    )  # fmt: skip


def write_demo_faces(folder: Path, identities: int, images_digiface: int, images_digi2real: int, size: int, seed: int) -> None:
    """Write digiface1m_000.parquet (PNG) and digi2real_000.parquet (JPEG) into `folder`, small sources for tests.

    The first nine tenths of the identities are in the first file; the second has half of those, and the last tenth.
    """
    first, second = range(identities - identities // 10), range(identities * 9 // 20, identities)
    png, jpeg = {"format": "png", "compress_level": 3}, {"format": "jpeg", "quality": 90}
    write_faces(folder / DEMO_FILES["digiface"], "digiface", first, images_digiface, png, size, seed)
    write_faces(folder / DEMO_FILES["digi2real"], "digi2real", second, images_digi2real, jpeg, size, seed)


def write_demo_data(folder: Path) -> None:
    """Write the two files of conf/demo into `folder`: the same bytes each time, as long as Pillow and pyarrow stay the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for style, name in DEMO_FILES.items():
        write_faces(folder / name, style, DEMO_PEOPLE[style], DEMO_IMAGES[style], DEMO_ENCODING, 112, DEMO_SEED)


if __name__ == "__main__":
    write_demo_data(DEMO_FOLDER)
