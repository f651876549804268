"""A few cases of every category; `python -m tests.attack` gives all of them."""

from collections import Counter

import pytest

from tests.attack.runner import grounds, run, table
from tests.attack.table import CASES

SAMPLED = 3


def test_there_are_many_cases_and_none_twice() -> None:
    names = Counter((case.category, case.name) for case in CASES)
    assert len(CASES) > 1000 and max(names.values()) == 1


def test_some_cases_of_every_category() -> None:
    by_category: dict[str, list] = {}
    for case in CASES:
        by_category.setdefault(case.category, []).append(case)
    some = [case for cases in by_category.values() for case in cases[:: max(1, len(cases) // SAMPLED)][:SAMPLED]]
    with grounds() as shared:
        outcomes = [run(case, shared) for case in some]
    wrong = {f"{o.case.category}: {o.case.name}": (o.found, o.said) for o in outcomes if not o.right}
    assert not wrong, table(outcomes)


@pytest.mark.slow
def test_all_cases() -> None:
    with grounds() as shared:
        outcomes = [run(case, shared) for case in CASES]
    wrong = {f"{o.case.category}: {o.case.name}": (o.found, o.said) for o in outcomes if not o.right}
    assert not wrong, table(outcomes)
