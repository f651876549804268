"""What a referring expression claims, and which things of a scene it fits: for RefShapes and for photographs.

A thing has words (attributes and, last, its noun), a centre, a box and an area. A claim is true of some things of a
scene, false of others and unclear where the margin is small. An expression is written only where its claim is true of
its target and false of every other thing: unclear counts as wrong.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

Point = tuple[float, float]
Box = tuple[float, float, float, float]
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
"""The axis (0 = x) and the direction of a side; y is down."""
ORDINALS = ("first", "second", "third", "fourth", "fifth")


class Thing(NamedTuple):
    """words: attributes by kind, the noun among them. centre (x, y), box (x0, y0, x1, y1), pixels; area: in pixels."""

    words: Mapping[str, str]
    centre: Point
    box: Box = (0.0, 0.0, 0.0, 0.0)
    area: float = 0.0


def fits(thing: Thing, words: Mapping[str, str]) -> bool:
    """Whether a thing has all the words."""
    return all(thing.words.get(kind) == value for kind, value in words.items())


def fitting(things: Sequence[Thing], words: Mapping[str, str]) -> list[int]:
    """The things that have all the words."""
    return [i for i, thing in enumerate(things) if fits(thing, words)]


def unique_words(things: Sequence[Thing], target: int, sets: Iterable[Sequence[str]]) -> list[dict[str, str]]:
    """Words of the target that fit no other thing, one dict for every set of kinds that is enough."""
    found = []
    for kinds in sets:
        words = {kind: things[target].words[kind] for kind in kinds}
        if fitting(things, words) == [target]:
            found.append(words)
    return found


def side_word(things: Sequence[Thing], target: int, rivals: Sequence[int], margin: float) -> str | None:
    """The first side on which the target lies beyond every rival by more than the margin, pixels."""
    centre = things[target].centre
    for word, (axis, sign) in SIDES.items():
        if rivals and all(sign * (centre[axis] - things[other].centre[axis]) > margin for other in rivals):
            return word
    return None


def relation(one: Point, other: Point) -> str:
    """Where `one` is as seen from `other`, along the axis on which they are further apart."""
    offset = (one[0] - other[0], one[1] - other[1])
    axis = int(abs(offset[1]) > abs(offset[0]))
    return (("to the left of", "to the right of"), ("above", "below"))[axis][int(offset[axis] > 0)]


def place_in_row(things: Sequence[Thing], members: Sequence[int], target: int, margin: float) -> tuple[int, int] | None:
    """The target's place from the left, from 0, and the number of members; None where they are no row with clear gaps.

    A row is wider than twice its height, by the centres, and neighbours are more than the margin apart.
    """
    order = sorted(members, key=lambda member: things[member].centre[0])
    xs = [things[member].centre[0] for member in order]
    ys = [things[member].centre[1] for member in order]
    gaps = [right - left for left, right in pairwise(xs)]
    if len(order) < 3 or min(gaps) <= margin or xs[-1] - xs[0] < 2 * (max(ys) - min(ys)):
        return None
    return order.index(target), len(order)


def extreme(things: Sequence[Thing], members: Sequence[int], target: int, factor: float) -> str | None:
    """`largest` or `smallest` where the target's area differs from every other member's by the factor."""
    areas = [things[member].area for member in members if member != target]
    own = things[target].area
    if not areas:
        return None
    if own >= factor * max(areas):
        return "largest"
    return "smallest" if own * factor <= min(areas) else None


def nearest(
    distance: Callable[[int, int], float], members: Sequence[int], anchor: int, target: int, factor: float
) -> bool:
    """Whether the target is nearer to the anchor than every other member by the factor."""
    others = [distance(member, anchor) for member in members if member != target]
    return bool(others) and factor * max(distance(target, anchor), 1.0) <= min(others)
