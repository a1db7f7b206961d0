"""How much of the core its own tests run, and a floor under it.

    make coverage

Prints lines and branches by package of the core, as `tests/source_tree.py` names it. Exit code 1 below
the floor. Last line: one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

from coverage import Coverage

from tests.source_tree import CORE_FILES, ROOT

FLOOR: Final = 0.95
"""Of lines and branches together: what is not covered today is defence against what cannot happen."""


def main() -> int:
    """Print the table; exit code 0, or 1 below the floor."""
    coverage = Coverage(data_file=ROOT / ".coverage", config_file=str(ROOT / "pyproject.toml"))
    coverage.load()
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path in CORE_FILES:
        numbers = coverage._analyze(str(path)).numbers
        covered, every = numbers.ratio_covered
        for name in (_package(path), "core"):
            totals[name][0] += covered
            totals[name][1] += every
    for name, (covered, every) in sorted(totals.items(), key=lambda each: each[0] == "core"):
        print(f"{name:36} {covered:6} of {every:6}  {100 * covered / every:5.1f} %")
    covered, every = totals["core"]
    print(json.dumps({"core_coverage": round(covered / every, 4), "floor": FLOOR}))
    return 0 if covered >= FLOOR * every else 1


def _package(path: Path) -> str:
    return path.relative_to(ROOT).parent.as_posix()


if __name__ == "__main__":
    sys.exit(main())
