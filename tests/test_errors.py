"""Types of annotations, as JSON files and builders of models are checked against them."""

from collections.abc import Sequence
from typing import Literal, Optional

import pytest

from amltrain.errors import first_line, fits, type_name


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, True),
        ("3", int, False),
        (True, int, False),  # JSON tells them apart
        (3, float, True),
        (None, float | None, True),
        ("x", Optional[float], False),  # noqa: UP045
        ("gt", Literal["ge", "gt"] | None, True),
        ("lt", Literal["ge", "gt"] | None, False),
        ([1, 2], Sequence[int], True),  # not looked into
    ],
)
def test_fits(value: object, kind: object, expected: bool) -> None:
    assert fits(value, kind) is expected


def test_types_in_words() -> None:
    assert type_name(Literal["ge", "gt"] | None) == "ge or gt or null"
    assert type_name(int) == "int"


def test_the_first_line_that_says_something() -> None:
    assert first_line(ValueError("\n  no such file\nat line 3")) == "no such file"
    assert first_line(KeyError()) == "KeyError"
