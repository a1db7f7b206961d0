"""From stored cells to what is kept: tables, `results.json` and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.policies import pictures, tables
from benchmarks.policies.cells import Cell
from benchmarks.policies.figures import compact, kept, rows_of
from benchmarks.policies.running import load
from benchmarks.policies.stamps import ROOT, stamp

KEPT_FILE: Final = ROOT / "benchmarks" / "policies" / "results.json"
IMAGES: Final = ROOT / "docs" / "images"
TABLES: Final = ROOT / "docs" / "policies.md"


def render(cells: Sequence[Cell], traces: Path, results: Path) -> dict[str, Any]:
    """Write all that is made of stored cells.

    A cell whose command line has changed is left out; one whose sources have changed is shown and named. The
    figures of one that is not stored here are those that were kept last, to their four digits.

    Returns:
        What was written, which cells are missing, stale or taken over from what was kept, and how many bytes
        are kept.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: A file cannot be read or written.
    """
    found, missing, stale, taken_over = [], [], [], []
    before = orjson.loads(KEPT_FILE.read_bytes())
    for cell in cells:
        stored = load(cell, results)
        if stored is not None and stored.argv == cell.argv:
            found.append((cell, stored.stamp, stored.cpu_s, rows_of(cell, stored.document)))
        elif (last := kept(before, cell)) is not None:
            taken_over.append(cell.name)
            found.append((cell, *last))
        else:
            missing.append(cell.name)
            continue
        if found[-1][1] != stamp(cell, traces):
            stale.append(cell.name)
    ran = [cell for cell, *_ in found]
    shown = [each for each in found if not each[0].pictures]
    rows = [row for *_, of_cell in shown for row in of_cell]
    KEPT_FILE.write_bytes(orjson.dumps(compact(shown)) + b"\n")
    TABLES.write_text(tables.document(rows, ran, stale), encoding="utf-8")
    drawn = pictures.draw(rows, ran, results, IMAGES)
    return {
        "cells": len(ran),
        "missing": missing,
        "stale": stale,
        "taken_over": taken_over,
        "kept_bytes": KEPT_FILE.stat().st_size,
        "written": [str(path) for path in (TABLES, KEPT_FILE, *drawn)],
        "cpu_s": round(sum(cpu_s for _, _, cpu_s, _ in found), 1),
    }
