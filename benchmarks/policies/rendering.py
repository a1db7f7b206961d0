"""From stored cells to what is kept: tables, `results.json` and pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.policies import pictures, tables
from benchmarks.policies.cells import Cell
from benchmarks.policies.excerpts import DOCUMENTS, excerpts
from benchmarks.policies.figures import compact, kept, rows_of
from benchmarks.policies.running import load
from benchmarks.policies.stamps import ROOT, stamp

KEPT_FILE: Final = ROOT / "benchmarks" / "policies" / "results.json"
IMAGES: Final = ROOT / "docs" / "images"
TABLES: Final = ROOT / "docs" / "policies.md"


def page(document: Mapping[str, Any], cells: Sequence[Cell], stale: Collection[str] = ()) -> str:
    """docs/policies.md, of what `results.json` keeps alone.

    Args:
        document: What is kept.
        cells: All of them; those that are not kept are left out.
        stale: Names of those whose sources have changed since they ran.
    """
    found = [(cell, last[2]) for cell in cells if (last := kept(document, cell)) is not None]
    return tables.document([row for _, rows in found for row in rows], [cell for cell, _ in found], stale)


def render(cells: Sequence[Cell], traces: Path, results: Path) -> dict[str, Any]:
    """Write all that is made of stored cells.

    A cell whose command line has changed is left out; one whose sources have changed is shown and named. The
    figures of one that is not stored here are those that were kept last, to their four digits.

    Returns:
        What was written, which cells are missing, stale or taken over from what was kept, and how many bytes
        are kept.

    Raises:
        ValueError: A document repeats a table that there is not.
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
    to_keep = compact([each for each in found if not each[0].pictures])
    KEPT_FILE.write_bytes(orjson.dumps(to_keep) + b"\n")
    text = page(to_keep, cells, stale)
    TABLES.write_text(text, encoding="utf-8")
    for path in DOCUMENTS:
        path.write_text(excerpts(path.read_text(encoding="utf-8"), text), encoding="utf-8")
    ran = [cell for cell, *_ in found]
    rows = [row for cell, *_, of_cell in found if not cell.pictures for row in of_cell]
    drawn = pictures.draw(rows, ran, results, IMAGES)
    return {
        "cells": len(ran),
        "missing": missing,
        "stale": stale,
        "taken_over": taken_over,
        "kept_bytes": KEPT_FILE.stat().st_size,
        "written": [str(path) for path in (TABLES, *DOCUMENTS, KEPT_FILE, *drawn)],
        "cpu_s": round(sum(cpu_s for _, _, cpu_s, _ in found), 1),
    }
