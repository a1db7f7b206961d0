"""From stored cells to what is kept: tables, `results.json` and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.policies import pictures, tables
from benchmarks.policies.cells import Cell
from benchmarks.policies.figures import compact, rows_of
from benchmarks.policies.running import is_current, load
from benchmarks.policies.stamps import ROOT

KEPT_FILE: Final = ROOT / "benchmarks" / "policies" / "results.json"
IMAGES: Final = ROOT / "docs" / "images"
TABLES: Final = ROOT / "docs" / "policies.md"


def render(cells: Sequence[Cell], traces: Path, results: Path) -> dict[str, Any]:
    """Write all that is made of stored cells.

    A cell whose command line has changed is left out; one whose sources have changed is shown and named.

    Returns:
        What was written, which cells are missing or stale, and how many bytes are kept.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: A file cannot be read or written.
    """
    found, missing, stale = [], [], []
    for cell in cells:
        stored = load(cell, results)
        if stored is None or stored.argv != cell.argv:
            missing.append(cell.name)
            continue
        if not is_current(cell, stored, traces):
            stale.append(cell.name)
        found.append((cell, stored.stamp, stored.cpu_s, rows_of(cell, stored.document)))
    ran = [cell for cell, *_ in found]
    shown = [(cell, stamp, cpu_s, rows) for cell, stamp, cpu_s, rows in found if not cell.pictures]
    rows = [row for *_, of_cell in shown for row in of_cell]
    KEPT_FILE.write_bytes(orjson.dumps(compact(shown)) + b"\n")
    TABLES.write_text(tables.document(rows, ran), encoding="utf-8")
    drawn = pictures.draw(rows, ran, results, IMAGES)
    return {
        "cells": len(ran),
        "missing": missing,
        "stale": stale,
        "kept_bytes": KEPT_FILE.stat().st_size,
        "written": [str(path) for path in (TABLES, KEPT_FILE, *drawn)],
        "cpu_s": round(sum(cpu_s for _, _, cpu_s, _ in found), 1),
    }
