"""Write referring expressions for objects that have a class and a mask but no sentence.

    the dog   the left person   the person on the far right   the second cup from the right   the largest dog
    the red car   the person in white   the bottle nearest to the chair   the cup to the left of the laptop

A sentence is written only if it fits one object of its picture by a clear margin; all objects of the class count, small
and hidden ones too. A class that a crowd annotation covers is never described in that picture. Colours are measured
from the pixels under the mask. Negatives name a class that the picture does not have, or a colour that the one object
of the class clearly does not have. Everything is a function of the seed and the picture's name.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from amltrain.data.sources.referring import (
    ORDINALS,
    SIDES,
    Thing,
    extreme,
    fitting,
    nearest,
    place_in_row,
    relation,
    side_word,
)

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
_WITHOUT_COLOUR = {
    "orange", "banana", "carrot", "broccoli", "apple", "pizza", "hot dog", "donut", "cake", "sandwich", "zebra",
    "giraffe", "elephant", "traffic light", "stop sign", "potted plant", "tv", "laptop", "mirror", "window", "bed",
    "dining table", "bicycle", "tennis racket", "book", "clock", "scissors", "fork", "knife", "spoon", "wine glass",
}  # fmt: skip
"""Classes that nobody tells apart by colour, or whose pixels show something else (screens, meals, thin things)."""
_IN_PIECES = {"carrot", "broccoli", "orange", "apple", "banana", "book", "dining table", "pizza", "cake", "sandwich"}
"""Classes that lie in heaps, or whose parts are annotated as objects: their sizes and rows are not what people see."""
ALIKE: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split(", "))
    for names in (
        "car, truck, bus, train, van",
        "bicycle, motorcycle",
        "cup, wine glass, bottle, bowl, vase",
        "couch, chair, bench, bed",
        "backpack, handbag, suitcase",
        "fork, knife, spoon",
        "tv, laptop, cell phone, remote, keyboard, mouse",
        "skis, snowboard, surfboard, skateboard",
        "dog, cat, bear, teddy bear",
        "sheep, cow, horse, dog",
        "apple, orange, sports ball, frisbee",
        "donut, cake, sandwich, pizza, hot dog",
        "microwave, oven, toaster, refrigerator",
        "dining table, bench",
        "bird, kite, airplane",
    )
)
"""Classes that people or annotators mix up: a sentence about one is not written where another could be meant."""
PERSON = ("person", "man", "woman", "boy", "girl", "child")


class DescribeOptions(NamedTuple):
    """sentences: at most so many per object. negatives: sentences that fit nothing, at most so many per picture. seed:
    of every choice. smallest: share of the picture that an object has to cover to be described.
    """

    sentences: int = 3
    negatives: int = 0
    seed: int = 0
    smallest: float = 0.004


DEFAULTS = DescribeOptions()


class Instance(NamedTuple):
    """An object of a picture. mask [h, w] of 0 and 1. crowd: several objects of the class in one annotation."""

    label: str
    mask: NDArray[np.uint8]
    crowd: bool = False


class Sentence(NamedTuple):
    """A sentence, the object it fits (None: nothing), and its kind."""

    text: str
    target: int | None
    kind: str


def describe_picture(
    image: Image.Image,
    instances: Sequence[Instance],
    name: str,
    options: DescribeOptions = DEFAULTS,
    classes: Sequence[str] = (),
) -> list[Sentence]:
    """Sentences for the objects of one picture.

    image: RGB, of the masks' size. name: of the picture; with the seed it fixes every choice. classes: all class names
    of the data set, from which negatives take those that the picture lacks.
    """
    generator = np.random.default_rng([options.seed, zlib.crc32(name.encode(errors="replace"))])
    scene = _Scene(image, instances)
    sentences: list[Sentence] = []
    for target in range(len(instances)):
        if not scene.can_be_named(target, options.smallest):
            continue
        found = scene.claims(target)
        kinds = list(dict.fromkeys(kind for kind, _ in found))
        chosen = [kinds[i] for i in generator.permutation(len(kinds))[: options.sentences].tolist()]
        for kind in chosen:
            texts = [text for own, text in found if own == kind]
            sentences.append(Sentence(texts[int(generator.integers(len(texts)))], target, kind))
    absent = scene.absent(classes)
    for i in generator.permutation(len(absent))[: options.negatives].tolist():
        sentences.append(absent[i])
    return sentences


class _Scene:
    """The things of a picture with their colours, and what can be claimed of each."""

    def __init__(self, image: Image.Image, instances: Sequence[Instance]) -> None:
        self.height, self.width = image.height, image.width
        self._instances = instances
        names = colour_names(image)
        self._dark = float((names == COLOURS.index("black")).mean())
        self.colours = [colour_shares(names, instance.mask) for instance in instances]
        self.things = [_thing(instance) for instance in instances]
        self._crowds = {instance.label for instance in instances if instance.crowd}
        self._distances: dict[int, NDArray[np.float64]] = {}

    def can_be_named(self, target: int, smallest: float) -> bool:
        """Whether the target is large and whole enough to be described, and its class is counted one by one."""
        thing, instance = self.things[target], self._instances[target]
        x0, y0, x1, y1 = thing.box
        large = thing.area >= smallest * self.height * self.width and min(x1 - x0, y1 - y0) >= 10
        whole = thing.area >= 0.2 * (x1 - x0) * (y1 - y0) and instance.label != "dining table"
        return large and whole and bool(instance.label) and instance.label not in self._crowds

    def _rivals(self, label: str) -> list[int]:
        return fitting(self.things, {"noun": label})

    def _similar(self, label: str) -> list[int]:
        """Things of other classes that could be taken for the class; they count as rivals."""
        names = {name for group in ALIKE if label in group for name in group} - {label}
        return [i for i, thing in enumerate(self.things) if thing.words["noun"] in names]

    def _alone(self, label: str) -> bool:
        """Whether the picture has nothing else that could be taken for the class."""
        return not self._similar(label)

    def claims(self, target: int) -> list[tuple[str, str]]:
        """(kind, sentence) of every claim that is true of the target and false of every other thing."""
        noun = self.things[target].words["noun"]
        members = self._rivals(noun)
        alone = self._alone(noun)
        found: list[tuple[str, str]] = []
        if len(members) == 1:
            if alone:
                found += [("class", f"the {noun}"), ("class", noun)]
            found += [("place", text) for text in self._corner(target, noun)] if alone else []
        else:
            similar = [*members, *self._similar(noun)]
            found += self._sides(target, similar, noun)
            found += self._row(target, members, noun) if alone else []
            found += self._sizes(target, similar, noun)
            found += self._relations(target, similar, noun) if noun not in _IN_PIECES else []
        if alone or len(members) > 1:
            found += self._coloured(target, members, noun)
        return found

    def _corner(self, target: int, noun: str) -> list[str]:
        """A third of the picture that the whole object lies in."""
        x0, _, x1, _ = self.things[target].box
        if x1 < 0.4 * self.width:
            return [f"the {noun} on the left", f"{noun} on the left side"]
        if x0 > 0.6 * self.width:
            return [f"the {noun} on the right", f"{noun} on the right side"]
        return []

    def _sides(self, target: int, members: Sequence[int], noun: str) -> list[tuple[str, str]]:
        rivals = [member for member in members if member != target]
        thing = self.things[target]
        found = []
        for word, (axis, sign) in SIDES.items():
            extent = (self.width, self.height)[axis]
            flat = [thing._replace(centre=self._only(i, axis)) for i, thing in enumerate(self.things)]
            side_of = side_word(flat, target, rivals, 0.1 * extent)
            if side_of != word or not self._beyond(thing, rivals, axis, sign):
                continue
            if axis == 0:
                texts = [f"the {word} {noun}", f"{word} {noun}", f"the {noun} on the {word}"]
                if len(members) > 2:
                    texts = [f"the {noun} on the far {word}", f"the {word}most {noun}"]
            else:
                texts = [f"the {word} {noun}", f"the {noun} at the {word}"]
            found += [("side", text) for text in texts]
        return found

    def _only(self, index: int, axis: int) -> tuple[float, float]:
        """A thing's centre with the other axis left out, so that only sides of this axis are found."""
        centre = self.things[index].centre
        return (centre[0], 0.0) if axis == 0 else (0.0, centre[1])

    def _beyond(self, thing: Thing, rivals: Sequence[int], axis: int, sign: int) -> bool:
        """Whether the box reaches further to the side than every rival's, and its near edge clears their centres."""
        near, far = (thing.box[axis + 2], thing.box[axis]) if sign < 0 else (thing.box[axis], thing.box[axis + 2])
        for other in rivals:
            box, centre = self.things[other].box, self.things[other].centre[axis]
            other_far = box[axis] if sign < 0 else box[axis + 2]
            if sign * (far - other_far) <= 0 or sign * (near - centre) <= 0:
                return False
        return True

    def _row(self, target: int, members: Sequence[int], noun: str) -> list[tuple[str, str]]:
        if len(members) > len(ORDINALS) or not self._is_a_row_of(members, noun):
            return []
        place = place_in_row(self.things, members, target, 0.06 * self.width)
        if place is None:
            return []
        from_left, count = place
        texts = [f"the {ORDINALS[from_left]} {noun} from the left"]
        texts.append(f"the {ORDINALS[count - 1 - from_left]} {noun} from the right")
        if count == 3 and from_left == 1:
            texts.append(f"the middle {noun}")
        return [("row", text) for text in texts]

    def _is_a_row_of(self, members: Sequence[int], noun: str) -> bool:
        """People count things that look alike and are wholly there; one far behind or cut off may not count."""
        areas = [self.things[member].area for member in members]
        enough = min(areas) >= 0.003 * self.height * self.width and max(areas) <= 5 * min(areas)
        return enough and noun not in _IN_PIECES and not any(self._cut_off(member) for member in members)

    def _cut_off(self, target: int) -> bool:
        x0, y0, x1, y1 = self.things[target].box
        return x0 <= 1 or y0 <= 1 or x1 >= self.width - 1 or y1 >= self.height - 1

    def _fill(self, target: int) -> float:
        """Share of its box that a thing covers."""
        x0, y0, x1, y1 = self.things[target].box
        return self.things[target].area / max(1.0, (x1 - x0) * (y1 - y0))

    def _sizes(self, target: int, members: Sequence[int], noun: str) -> list[tuple[str, str]]:
        word = extreme(self.things, members, target, 1.8)
        if word is None or noun in _IN_PIECES or len(members) > 6 or self._fill(target) < 0.35:
            return []
        if word == "smallest" and not self._is_whole(target):
            return []
        texts = [f"the {word} {noun}"]
        if len(members) == 2:
            texts.append(f"the {'bigger' if word == 'largest' else 'smaller'} {noun}")
        return [("size", text) for text in texts]

    def _is_whole(self, target: int) -> bool:
        """Whether nothing seems to be cut off or hidden: of a part nobody says that it is the smallest."""
        large = self.things[target].area >= 0.015 * self.height * self.width
        return large and not self._cut_off(target) and self._fill(target) >= 0.45

    def _anchors(self, noun: str) -> list[int]:
        """Things that are the only one of their class, easy to see, and not of the target's kind."""
        found = []
        for i, thing in enumerate(self.things):
            label = thing.words["noun"]
            easy = thing.area >= 0.02 * self.height * self.width and thing.area <= 0.4 * self.height * self.width
            only = len(self._rivals(label)) == 1 and label not in self._crowds and self._alone(label)
            if label and label != noun and easy and only and not any({label, noun} <= group for group in ALIKE):
                found.append(i)
        return found

    def _relations(self, target: int, members: Sequence[int], noun: str) -> list[tuple[str, str]]:
        found = []
        diagonal = float(np.hypot(self.height, self.width))
        for anchor in self._anchors(noun):
            label = self.things[anchor].words["noun"]
            distances = [self._distance(member, anchor) for member in members if member != target]
            clear = min(distances) - self._distance(target, anchor) > 0.08 * diagonal
            if clear and nearest(self._distance, members, anchor, target, 2.0):
                found += [
                    ("near", f"the {noun} nearest to the {label}"),
                    ("near", f"the {noun} closest to the {label}"),
                ]
            words = {member: self._relation(member, anchor) for member in members}
            own = words[target]
            if own is not None and [m for m, word in words.items() if word in (own, None)] == [target]:
                found.append(("relation", f"the {noun} {own} the {label}"))
        return found

    def _relation(self, member: int, anchor: int) -> str | None:
        """Left or right of the anchor where the boxes are apart; None where they overlap along x."""
        one, other = self.things[member], self.things[anchor]
        if one.box[2] > other.box[0] and one.box[0] < other.box[2]:
            return None
        return relation((one.centre[0], 0.0), (other.centre[0], 0.0))

    def _distance(self, one: int, other: int) -> float:
        """Pixels between the nearest points of two masks."""
        if other not in self._distances:
            self._distances[other] = ndimage.distance_transform_edt(self._instances[other].mask == 0)
        inside = self._distances[other][self._instances[one].mask > 0]
        return float(inside.min()) if inside.size else float("inf")

    def _coloured(self, target: int, members: Sequence[int], noun: str) -> list[tuple[str, str]]:
        if noun in _WITHOUT_COLOUR or self.things[target].area < 0.008 * self.height * self.width:
            return []
        shares = self.colours[target]
        colour = max(shares, key=lambda name: shares[name])
        enough = 0.75 if colour in ("black", "white", "brown") else 0.55
        if noun in PERSON:
            x0, y0, x1, y1 = self.things[target].box
            if y1 - y0 < 1.3 * (x1 - x0) or y1 - y0 < 0.3 * self.height or self._cut_off(target):
                return []  # a face or a hand has no clothes
        if colour == "black" and self._dark > 0.35:
            return []  # everything is black in the dark
        if colour == "grey" or shares[colour] < enough:
            return []
        others = [self.colours[member].get(colour, 0.0) for member in members if member != target]
        if any(share > 0.15 for share in others):
            return []
        if noun in PERSON:
            return [("colour", f"the {noun} in {colour}"), ("colour", f"{noun} wearing {colour}")]
        return [("colour", f"the {colour} {noun}"), ("colour", f"{colour} {noun}")]

    def absent(self, classes: Sequence[str]) -> list[Sentence]:
        """Sentences that fit nothing in the picture, by a clear margin."""
        there = {thing.words["noun"] for thing in self.things}
        near = {name for group in ALIKE if group & there for name in group}
        found = [Sentence(f"the {name}", None, "absent") for name in classes if name and name not in there | near]
        for label in sorted(there - self._crowds):
            members = self._rivals(label)
            if label in _WITHOUT_COLOUR or label in PERSON or len(members) > 2 or not self._alone(label):
                continue
            if any(self.things[member].area < 0.01 * self.height * self.width for member in members):
                continue
            for colour in ("red", "yellow", "green", "blue", "purple", "pink"):
                if all(self.colours[member].get(colour, 0.0) < 0.01 for member in members):
                    found.append(Sentence(f"the {colour} {label}", None, "absent colour"))
        return found


def _thing(instance: Instance) -> Thing:
    rows, columns = np.nonzero(instance.mask)
    if not len(rows):
        return Thing({"noun": instance.label}, (0.0, 0.0))
    box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
    return Thing({"noun": instance.label}, (float(columns.mean()), float(rows.mean())), box, float(len(rows)))


def colour_names(image: Image.Image) -> NDArray[np.int64]:
    """The place in COLOURS of every pixel's colour, [h, w]; -1 where people would not agree on a name."""
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype(np.float64)
    hue, saturation, value = hsv[..., 0] * 360 / 255, hsv[..., 1] / 255, hsv[..., 2] / 255
    names = np.full(hue.shape, -1, np.int64)
    chromatic = (saturation > 0.4) & (value > 0.3)
    bands = (
        ("red", (hue < 11) | (hue >= 346), chromatic),
        ("orange", (hue >= 14) & (hue < 40), (saturation > 0.6) & (value > 0.7)),
        ("brown", (hue >= 8) & (hue < 42), (saturation > 0.35) & (value > 0.15) & (value < 0.55)),
        ("yellow", (hue >= 44) & (hue < 66), chromatic & (value > 0.5)),
        ("green", (hue >= 76) & (hue < 165), chromatic & (value > 0.2)),
        ("blue", (hue >= 195) & (hue < 255), chromatic),
        ("purple", (hue >= 262) & (hue < 305), chromatic),
        ("pink", (hue >= 308) & (hue < 346), (saturation > 0.25) & (value > 0.6)),
    )
    for name, inside, enough in bands:
        names[inside & enough] = COLOURS.index(name)
    names[(value < 0.2) | ((value < 0.28) & (saturation < 0.35))] = COLOURS.index("black")
    names[(value > 0.78) & (saturation < 0.13)] = COLOURS.index("white")
    names[(value >= 0.28) & (value <= 0.7) & (saturation < 0.12)] = COLOURS.index("grey")
    return names


def colour_shares(names: NDArray[np.int64], mask: NDArray[np.uint8]) -> dict[str, float]:
    """The share of every colour under a mask, its rim left out: masks are seldom exact to the pixel."""
    inner = ndimage.binary_erosion(mask > 0, iterations=2)
    inside = names[inner if inner.sum() >= 30 else mask > 0]
    counts = np.bincount(inside[inside >= 0], minlength=len(COLOURS))
    return {name: float(count) / max(len(inside), 1) for name, count in zip(COLOURS, counts.tolist(), strict=True)}
