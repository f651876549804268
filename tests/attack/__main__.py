"""Give every hostile case to its reader and print how many were answered rightly, by category.

python -m tests.attack [--only TEXT] [--list] [--decide]
"""

import argparse
import sys

from tests.attack.runner import grounds, run, table, write_decisions
from tests.attack.table import CASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose category or name contains this (default: all)")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--decide", action="store_true", help="write decided.csv as found; read what it changes")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in f"{case.category}: {case.name}"]
    if options.list:
        print("\n".join(f"{case.category}: {case.name} -> {case.expected}" for case in cases))
        return
    outcomes = []
    with grounds() as shared:
        for case in cases:
            outcomes.append(run(case, shared))
            if not outcomes[-1].right:
                print(f"{case.category}: {case.name}: {outcomes[-1].found}, not {case.expected}\n{outcomes[-1].said}\n")
    if options.decide:
        write_decisions(outcomes)
    print(table(outcomes))
    sys.exit(not all(outcome.right for outcome in outcomes))


if __name__ == "__main__":
    main()
