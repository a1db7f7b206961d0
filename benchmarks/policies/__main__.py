"""Routing policies compared by replay, as commands that were really executed.

    python -m benchmarks.policies --traces DIR [--only WORDS]... [--jobs N] [--results DIR]
    python -m benchmarks.policies --traces DIR --list
    python -m benchmarks.policies --traces DIR --verify CELL
    python -m benchmarks.policies --traces DIR --render

The first runs each declared `tokenway replay` line that is not stored yet; stop it at any time and start it
again. `--only` takes workloads, groups, kinds, seeds or names of cells, and each further one narrows. The
second prints the lines. The third runs one stored cell again and says what differs. The last makes tables,
pictures and `results.json` of what is stored. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.policies.cells import named, selected
from benchmarks.policies.questions import every_cell
from benchmarks.policies.rendering import render
from benchmarks.policies.running import is_current, load, run_cells, verify

RESULTS: Final = Path("build/policies")
"""Ignored by git; what is kept of it is made by `--render`."""

_NICE: Final = 19
"""The lowest priority: it takes hours, and nothing in it depends on real time but the cost of decisions."""


def main() -> int:
    """Exit code 0; 1 if a cell failed or differs; 2 if something asked for is wrong."""
    options = _parser().parse_args()
    try:
        return _main(options)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"benchmarks.policies: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    every = every_cell()
    chosen = selected(every, options.only)
    if options.render:
        print(json.dumps(render(every, options.traces, options.results)))
        return 0
    if options.list:
        for cell in chosen:
            state = "stored" if is_current(cell, load(cell, options.results), options.traces) else "open"
            print(f"{state:6} {cell.name:36} {' '.join(cell.argv)}")
        return 0
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}", flush=True)
    if options.verify is not None:
        cell = named(every, options.verify)
        found = verify(cell, options.traces, options.results, options.jobs)
        print("\n".join(found[:40]))
        print(json.dumps({"cell": cell.name, "runs": cell.runs, "differences": len(found)}))
        return int(bool(found))
    os.nice(_NICE)
    done = run_cells(chosen, options.traces, options.results, options.jobs)
    print(json.dumps(done))
    return int(bool(done["failed"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--traces", type=Path, required=True, metavar="DIR", help="folder of the trace files")
    add("--only", action="append", default=[], metavar="WORDS", help="comma-separated; repeat to narrow")
    add("--jobs", type=int, default=1, metavar="N", help="processes of one command")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="where figures are kept")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the lines and what is stored")
    what.add_argument("--verify", metavar="CELL", help="run a stored cell again and compare")
    what.add_argument("--render", action="store_true", help="tables, pictures and results.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
