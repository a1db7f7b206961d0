"""Executes cells as the installed command, one after another, and keeps what they print.

Rules:
    1. A cell whose file has its command line and its stamp is not run again.
    2. A file appears whole or not at all. A cell that fails is reported and the next one is run.
    3. The caller sets the priority: commands inherit it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.policies.cells import WORKLOADS, Cell
from benchmarks.policies.stamps import stamp

CELL_TIMEOUT_S: Final = 4 * 3600.0
"""Many times the longest cell, on a machine that others keep busy."""

_SHORT_RUN_S: Final = 5.5
"""A run of the conversation trace's first 4,000 requests, as `Workload.run_s`."""

_FILE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A cell's file.

    Attributes:
        argv: The command line that ran.
        stamp: Of what its figures depend on.
        cpu_s: Processor time it took.
        document: What `tokenway replay --json` wrote.
    """

    argv: tuple[str, ...]
    stamp: str
    cpu_s: float
    document: Mapping[str, Any]


def path_of(cell: Cell, results: Path) -> Path:
    """Where a cell's figures are."""
    return results / f"{cell.name}.json"


def pictures_of(cell: Cell, results: Path) -> Path:
    """The folder of a cell's pictures."""
    return results / f"{cell.name}.plots"


def load(cell: Cell, results: Path) -> Stored | None:
    """What is stored of a cell; None if nothing is, or nothing that can be read."""
    try:
        found = orjson.loads(path_of(cell, results).read_bytes())
        if found["version"] != _FILE_VERSION:
            return None
        return Stored(tuple(found["argv"]), found["stamp"], found["cpu_s"], found["replay"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_current(cell: Cell, stored: Stored | None, traces: Path) -> bool:
    """True if what is stored is what a run would give."""
    return stored is not None and stored.argv == cell.argv and stored.stamp == stamp(cell, traces)


def execute(cell: Cell, traces: Path, jobs: int, plots: Path | None) -> tuple[Mapping[str, Any], float]:
    """Run the command line of a cell.

    Args:
        cell: Which.
        traces: Folder it runs in.
        jobs: Processes it may take.
        plots: Where its pictures go, or None for none.

    Returns:
        Its document, and the seconds of processor time it took.

    Raises:
        subprocess.SubprocessError: It failed or took too long.
        OSError: The command is not installed.
    """
    command = Path(sys.executable).with_name("tokenway")
    with tempfile.TemporaryDirectory(prefix="tokenway-policies-") as folder:
        written = Path(folder) / "cell.json"
        where = ["--json", str(written), "--jobs", str(jobs)]
        if plots is not None:
            where += ["--plots", str(plots)]
        started_s = _children_s()
        subprocess.run(  # noqa: S603 - a declared line
            [str(command), *cell.argv[1:], *where],
            cwd=traces,
            check=True,
            capture_output=True,
            text=True,
            timeout=CELL_TIMEOUT_S,
        )
        return orjson.loads(written.read_bytes()), _children_s() - started_s


def _children_s() -> float:
    """Processor time of all commands so far, their own processes included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_cells(cells: Sequence[Cell], traces: Path, results: Path, jobs: int) -> dict[str, Any]:
    """Run what is not stored yet, and say so line by line.

    Returns:
        How many ran, were stored already, and failed (by name); and the seconds it took.
    """
    results.mkdir(parents=True, exist_ok=True)
    open_cells = [cell for cell in cells if not is_current(cell, load(cell, results), traces)]
    print(
        f"{len(cells)} cells, {len(cells) - len(open_cells)} of them stored;"
        f" about {estimate_s(open_cells, results) / jobs / 60:.0f} minutes of {jobs} whole cores to go",
        flush=True,
    )
    failed: list[str] = []
    started = time.monotonic()
    for number, cell in enumerate(open_cells, 1):
        print(f"[{number}/{len(open_cells)}] {cell.name}: {' '.join(cell.argv)}", flush=True)
        before = stamp(cell, traces)
        plots = pictures_of(cell, results) if cell.pictures else None
        try:
            document, cpu_s = execute(cell, traces, jobs, plots)
        except (subprocess.SubprocessError, OSError) as error:
            failed.append(cell.name)
            print(f"    failed: {str(getattr(error, 'stderr', None) or error).strip()[-1000:]}", flush=True)
            continue
        if stamp(cell, traces) != before:
            failed.append(cell.name)
            print("    dropped: its sources changed while it ran", flush=True)
            continue
        stored = {
            "version": _FILE_VERSION,
            "argv": cell.argv,
            "stamp": before,
            "cpu_s": cpu_s,
            "replay": document,
        }
        part = path_of(cell, results).with_suffix(".part")
        part.write_bytes(orjson.dumps(stored))
        part.replace(path_of(cell, results))
        left_s = estimate_s(open_cells[number:], results) / jobs
        print(
            f"    {cpu_s:.0f} s of a core; about {left_s / 60:.0f} minutes of {jobs} whole cores to go",
            flush=True,
        )
    return {
        "cells": len(cells),
        "ran": len(open_cells) - len(failed),
        "stored_before": len(cells) - len(open_cells),
        "failed": failed,
        "wall_s": round(time.monotonic() - started, 1),
    }


def estimate_s(cells: Sequence[Cell], results: Path) -> float:
    """Seconds of one core: what a cell took before, or what runs of its workload usually take."""
    usual = {workload.name: workload.run_s for workload in WORKLOADS}
    return sum(
        stored.cpu_s
        if (stored := load(cell, results)) is not None
        else cell.runs * usual.get(cell.workload, _SHORT_RUN_S)
        for cell in cells
    )


def verify(cell: Cell, traces: Path, results: Path, jobs: int) -> list[str]:
    """Run a stored cell again.

    Returns:
        What differs, one line each; real times of decisions are not compared.

    Raises:
        ValueError: Nothing is stored of it.
        subprocess.SubprocessError: It fails.
    """
    stored = load(cell, results)
    if stored is None:
        raise ValueError(f"{cell.name} is not stored")
    document, _ = execute(cell, traces, jobs, None)
    return differences(stored.document, document)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Where two documents of the same command differ, real times of decisions apart."""
    if len(before["runs"]) != len(after["runs"]):
        return [f"{len(before['runs'])} runs before, {len(after['runs'])} now"]
    return sorted(
        f"{new['policy']} x{new['speed']:g} {key}: {old.get(key)} before, {new.get(key)} now"
        for old, new in zip(before["runs"], after["runs"], strict=True)
        for key in (old.keys() | new.keys()) - {"decision"}
        if old.get(key) != new.get(key)
    )
