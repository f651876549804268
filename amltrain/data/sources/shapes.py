"""RefShapes: synthetic scenes in the original REFER layout, so that everything runs without a download.

A scene holds a few shapes that differ in size, colour, texture and form and hide each other in part. For every object
there is another of its colour and another of its form, so the picture alone does not tell which is meant: the sentence
is needed. A sentence is written only if it fits its target and no other object.

    refshapes    location words allowed, as in RefCOCO; objects come in twins that only their place tells apart
    refshapes+   no location words, as in RefCOCO+
    refshapesg   long sentences that name a second object, as in RefCOCOg
    grefshapes   several targets, or none, as in gRefCOCO

The files go through the same readers as real data: refs as a pickle (gRefCOCO's as JSON), polygons for whole objects,
run lengths for partly hidden ones. Everything is a function of the seed and the scene's number.
"""

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from amltrain.data.catalog import dataset_spec
from amltrain.data.segmentation import decode_rle, referent_mask
from amltrain.data.sources.referring import Thing, fitting, relation, side_word, unique_words
from amltrain.data.sources.shape_styles import OUTLINES, SIMPLE, STYLES, SceneStyle
from amltrain.errors import UserError

TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "big")
SPLIT_SIZES = {"train": 4000, "val": 250, "testA": 250, "testB": 250, "test": 250}
SMALLEST_SCENE = 16
"""Side in pixels; below half of it a shape may cover no pixel."""
IMAGE_FOLDER = "images/mscoco/images/train2014"

Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """An object of a scene. centre (x, y) and radius in pixels; polygon [x0, y0, x1, y1, ...]."""

    size: str
    colour: str
    texture: str
    form: str
    centre: Point
    radius: float
    polygon: tuple[float, ...]

    def thing(self) -> Thing:
        """What expressions about it can claim."""
        words = {"size": self.size, "texture": self.texture, "colour": self.colour, "form": self.form}
        return Thing(words, self.centre)


@dataclass
class Scene:
    """image [S, S, 3] uint8; masks: the visible part of every shape, [S, S] bool."""

    shapes: list[Shape]
    image: np.ndarray
    masks: list[np.ndarray]
    style: SceneStyle = SIMPLE

    @property
    def things(self) -> list[Thing]:
        """The shapes as expressions see them."""
        return [shape.thing() for shape in self.shapes]


def write_refshapes(
    root: Path | str,
    flavour: str = "refshapes",
    *,
    split_sizes: dict[str, int] | None = None,
    size: int = 96,
    seed: int = 0,
    style: str = "simple",
    described: int = 3,
    progress: bool = True,
) -> Path:
    """Write one flavour under a REFER root and return its annotation folder.

    split_sizes: scenes per split; splits that the flavour does not have are ignored. size: side in pixels. style: a
    key of `shape_styles.STYLES`. described: most objects of a scene that get sentences. testB scenes are more crowded
    than the others. Raises UserError, before anything is written.
    """
    spec = dataset_spec(flavour)
    root, sizes = Path(root), {**SPLIT_SIZES, **(split_sizes or {})}
    _check_request({split: sizes[split] for split in spec.splits}, size, seed)
    looks = STYLES[style]
    image_folder = root / IMAGE_FOLDER
    image_folder.mkdir(parents=True, exist_ok=True)
    scenes = [(split, number) for split in spec.splits for number in range(sizes[split])]
    instances: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": form} for i, form in enumerate(looks.forms)],
    }
    refs: list[dict[str, Any]] = []
    sent_id = 0
    for image_id, (split, number) in enumerate(
        tqdm(scenes, desc=f"draw {flavour}", unit="scene", disable=None if progress else True), 1
    ):
        generator = np.random.default_rng([seed, list(SPLIT_SIZES).index(split), number])
        scene = draw_scene(generator, size, crowded=split == "testB", twins=flavour == "refshapes", style=looks)
        file_name = f"COCO_train2014_{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(image_folder / file_name, quality=92)
        instances["images"].append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        first_annotation = len(instances["annotations"]) + 1
        instances["annotations"] += [
            annotation(scene, index, first_annotation + index, image_id) for index in range(len(scene.shapes))
        ]
        for targets, sentences in expressions(generator, scene, flavour, described):
            named = {"ref_id": len(refs) + 1, "image_id": image_id, "split": split, "file_name": file_name}
            categories = [looks.forms.index(scene.shapes[target].form) + 1 for target in targets]
            ann_ids = [first_annotation + target for target in targets]
            if spec.generalised:
                named |= {"ann_id": ann_ids or [-1], "category_id": categories}
            else:
                named |= {"ann_id": ann_ids[0], "category_id": categories[0]}
            refs.append({**named, **_sentences(sentences, sent_id)})
            sent_id += len(sentences)
    folder = root / spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instances.json").write_text(json.dumps(instances))
    if spec.generalised:
        (folder / f"{spec.refs_name}.json").write_text(json.dumps(refs))
    else:
        (folder / f"{spec.refs_name}.p").write_bytes(pickle.dumps(refs, protocol=2))
    return folder


def _check_request(split_sizes: dict[str, int], size: int, seed: int) -> None:
    empty = [split for split, scenes in split_sizes.items() if scenes < 1]
    if empty:
        option = "train" if empty[0] == "train" else "evaluation"
        raise UserError(f"data.shapes.{option} is {split_sizes[empty[0]]}; a split needs at least 1 scene")
    if size < SMALLEST_SCENE:
        raise UserError(f"data.shapes.size is {size}; the shapes need scenes of at least {SMALLEST_SCENE} pixels")
    if seed < 0:
        raise UserError(f"data.shapes.seed is {seed}; choose 0 or more")


def _sentences(sentences: list[str], first: int) -> dict[str, Any]:
    """Return the sentence fields of a ref, numbered from `first`."""
    numbered = [
        {"sent_id": first + i, "sent": sentence, "raw": sentence.capitalize(), "tokens": sentence.split()}
        for i, sentence in enumerate(sentences)
    ]
    return {"sent_ids": [sentence["sent_id"] for sentence in numbered], "sentences": numbered}


def draw_scene(
    generator: np.random.Generator, size: int, *, crowded: bool, twins: bool, style: SceneStyle = SIMPLE
) -> Scene:
    """A few shapes on a textured ground, later ones over earlier ones."""
    low, high = style.crowded if crowded else style.objects
    count = int(generator.integers(low, high + 1))
    attributes = _attributes(generator, count, twins, style)
    places = _place(generator, size, [_radius(generator, size, words["size"], style) for words in attributes])
    shapes = [
        Shape(**words, centre=centre, radius=radius, polygon=_polygon(generator, words["form"], centre, radius))
        for words, (centre, radius) in ((attributes[i], place) for i, place in places.items())
    ]
    ground = style.ground(generator, size)
    canvas = Image.fromarray(ground)
    masks: list[np.ndarray] = []
    for shape in shapes:
        covered = decode_rle(referent_mask([[list(shape.polygon)]], size, size).union) > 0  # as the readers will
        mask = Image.fromarray(covered)
        box = mask.getbbox() or (0, 0, size, size)
        surface = _surface(generator, shape, style.colours[shape.colour], box, size)
        canvas.paste(Image.fromarray(surface), box, mask.crop(box))
        masks = [earlier & ~covered for earlier in masks] + [covered]
    return Scene(shapes, np.asarray(canvas), masks, style)


def expressions(
    generator: np.random.Generator, scene: Scene, flavour: str, described: int = 3
) -> list[tuple[list[int], list[str]]]:
    """(targets, sentences) of a scene, of `described` objects at most; every sentence fits exactly its targets."""
    if flavour == "grefshapes":
        return _generalised(generator, scene)
    found = []
    for target in range(len(scene.shapes)):
        if scene.masks[target].sum() < 0.5 * _whole_area(scene.shapes[target]):
            continue  # too little of it can be seen
        sentences = _descriptions(generator, scene, target, flavour)
        if sentences:
            found.append(([target], sentences))
    return [found[i] for i in sorted(generator.permutation(len(found))[:described].tolist())]


def annotation(scene: Scene, index: int, annotation_id: int, image_id: int) -> dict[str, Any]:
    """COCO annotation of a shape: its polygon, or run lengths of what can be seen of it."""
    shape, mask = scene.shapes[index], scene.masks[index]
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        box = [shape.centre[0], shape.centre[1], 0.0, 0.0]
    else:
        box = [float(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
    hidden = any(
        math.dist(shape.centre, other.centre) < shape.radius + other.radius for other in scene.shapes[index + 1 :]
    )
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": scene.style.forms.index(shape.form) + 1,
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(mask) if hidden else [list(shape.polygon)],
    }


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths, columns first, of a [h, w] bool mask."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def _attributes(generator: np.random.Generator, count: int, twins: bool, style: SceneStyle) -> list[dict[str, str]]:
    """Looks of the shapes: the second shares the first's form, the third its colour, and a twin everything."""

    def pick(options: Any) -> str:
        return str(generator.choice(list(options)))

    def random_look() -> dict[str, str]:
        texture = pick(TEXTURES) if generator.random() < 0.3 else "plain"
        return {"size": pick(SIZES), "colour": pick(style.colours), "texture": texture, "form": pick(style.forms)}

    first = random_look()
    looks = [
        first,
        {**random_look(), "form": first["form"], "colour": pick(c for c in style.colours if c != first["colour"])},
        {**random_look(), "colour": first["colour"], "form": pick(f for f in style.forms if f != first["form"])},
    ]
    if style.one_form:
        looks = [{**look, "form": first["form"]} for look in [first, *(random_look() for _ in range(count - 1))]]
    while len(looks) < count:
        if twins and len(looks) == 3 and generator.random() < 0.5:
            looks.append(dict(looks[int(generator.integers(3))]))
        else:
            looks.append(random_look())
    return [looks[i] for i in generator.permutation(count)]


def _radius(generator: np.random.Generator, size: int, kind: str, style: SceneStyle) -> float:
    low, high = style.small if kind == "small" else style.big
    return float(generator.uniform(low, high) * size)


def _place(generator: np.random.Generator, size: int, radii: list[float]) -> dict[int, tuple[Point, float]]:
    """Centre and radius of every shape, by its number. All lie inside, neighbours overlap by a fifth at most; a shape
    that finds no free place is left out, but three are always there.
    """
    while True:
        placed: dict[int, tuple[Point, float]] = {}
        for number, radius in enumerate(radii):
            for _ in range(200):
                x, y = generator.uniform(radius, size - radius, 2).tolist()
                if all(math.dist((x, y), centre) > 0.8 * (radius + other) for centre, other in placed.values()):
                    placed[number] = (x, y), radius
                    break
        if len(placed) >= 3:
            return placed


def _polygon(generator: np.random.Generator, form: str, centre: Point, radius: float) -> tuple[float, ...]:
    """The form's outline, turned by up to 14 degrees."""
    turn = float(generator.uniform(-0.25, 0.25))
    points: list[float] = []
    for x, y in OUTLINES[form]:
        angle, reach = math.atan2(y, x) + turn, radius * math.hypot(x, y)
        points += [round(centre[0] + reach * math.cos(angle), 2), round(centre[1] + reach * math.sin(angle), 2)]
    return tuple(points)


def _whole_area(shape: Shape) -> float:
    x, y = np.array(shape.polygon[0::2]), np.array(shape.polygon[1::2])
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def _surface(
    generator: np.random.Generator, shape: Shape, colour: Sequence[int], box: tuple[int, int, int, int], size: int
) -> np.ndarray:
    """Draw a shape's surface for its box, uint8 RGB: its colour, dark stripes or dots, and some grain."""
    left, top, right, bottom = box
    rows, columns = np.mgrid[top:bottom, left:right]
    surface = np.array(colour, np.float64) + generator.normal(0, 6, (*rows.shape, 3))
    period = max(4, round(size / 16))
    if shape.texture == "striped":
        surface[(rows + columns) % period < period / 2] *= 0.35
    elif shape.texture == "dotted":
        half = (period - 1) / 2
        surface[np.hypot(rows % period - half, columns % period - half) < period / 3.2] *= 0.35
    return surface.clip(0, 255).astype(np.uint8)


def _unique_words(scene: Scene, target: int) -> list[dict[str, str]]:
    """Return sets of attribute words that fit only the target: colour, form, and further attributes."""
    extras = ((), ("texture",), ("size",), ("size", "texture"))
    return unique_words(scene.things, target, [(*extra, "colour", "form") for extra in extras])


def _phrase(words: dict[str, str]) -> str:
    return " ".join(words[kind] for kind in ("size", "texture", "colour", "form") if kind in words)


def _place_word(scene: Scene, target: int, words: dict[str, str]) -> str | None:
    """A location word that tells the target from all others that the words fit, by a clear margin."""
    things = scene.things
    rivals = [other for other in fitting(things, words) if other != target]
    return side_word(things, target, rivals, 0.12 * scene.image.shape[0])


def _descriptions(generator: np.random.Generator, scene: Scene, target: int, flavour: str) -> list[str]:
    shape = scene.shapes[target]
    sentences = [_phrase(words) for words in _unique_words(scene, target)]
    if flavour == "refshapes":
        words = {"colour": shape.colour, "form": shape.form}
        place = _place_word(scene, target, words)
        if place:
            sentences += [f"{place} {_phrase(words)}", f"the {_phrase(words)} on the {place}"]
    if flavour == "refshapesg":
        sentences = [_with_neighbour(generator, scene, target, words) for words in _unique_words(scene, target)]
    chosen = generator.permutation(len(sentences))[:3]
    return [sentences[i] for i in chosen.tolist()]


def _with_neighbour(generator: np.random.Generator, scene: Scene, target: int, words: dict[str, str]) -> str:
    """A long sentence: the target, and where it is as seen from another object."""
    shape = scene.shapes[target]
    others = [i for i in range(len(scene.shapes)) if i != target and _unique_words(scene, i)]
    start = f"the {_phrase(words)}"
    if not others:
        return f"{start} that you can see somewhere in the picture"
    other = scene.shapes[others[int(generator.integers(len(others)))]]
    named = _phrase(_unique_words(scene, scene.shapes.index(other))[0])
    return f"{start} which is {relation(shape.centre, other.centre)} the {named}"


def _generalised(generator: np.random.Generator, scene: Scene) -> list[tuple[list[int], list[str]]]:
    """Return samples with one target, two, all of a kind, and none."""
    single = [i for i in range(len(scene.shapes)) if _unique_words(scene, i)]
    named = {i: _phrase(_unique_words(scene, i)[0]) for i in single}
    found: list[tuple[list[int], list[str]]] = []
    if single:
        one = single[int(generator.integers(len(single)))]
        found.append(([one], [named[one], f"the {named[one]}"]))
    if len(single) >= 2:
        a, b = sorted(generator.permutation(single)[:2].tolist())
        found.append(([a, b], [f"the {named[a]} and the {named[b]}", f"{named[b]} and {named[a]}"]))
    form = scene.shapes[int(generator.integers(len(scene.shapes)))].form
    alike = [i for i, shape in enumerate(scene.shapes) if shape.form == form]
    if len(alike) >= 2:
        found.append((alike, [f"all {form}s", f"every {form}"]))
    absent = [
        f"{colour} {form}"
        for colour in scene.style.colours
        for form in scene.style.forms
        if not fitting(scene.things, {"colour": colour, "form": form})
    ]
    phrase = absent[int(generator.integers(len(absent)))]
    found.append(([], [phrase, f"the {phrase}"]))
    return found
