"""`tokenway top`: every endpoint's load, refreshed in place, read from a running gateway's admin port."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Final

import orjson

from extproc.observing.printable import escaped_json, printable
from tokenway.cli.admin_answer import fetch
from tokenway.cli.admin_url import UNREADABLE, foreign

_HOME_AND_CLEAR = "\x1b[H\x1b[2J"
_COLUMNS = (
    "endpoint",
    "cluster",
    "source",
    "state",
    "requests",
    "prefill tok",
    "context tok",
    "cache",
    "TTFT ms",
    "req/s",
    "served",
    "failed",
    "weight",
    "labels",
    "reason",
)
_LEFT_ALIGNED = frozenset({"endpoint", "cluster", "source", "state", "labels", "reason"})


def top(admin_url: str, *, once: bool, interval_s: float, as_json: bool = False) -> int:
    """Show the endpoint table, once or until interrupted.

    Args:
        admin_url: Base URL of the admin port.
        once: Print one table and return.
        interval_s: Between refreshes.
        as_json: Print the gateway's JSON, one object per line, instead of the table.

    Returns:
        Exit code: 0, or 1 if the gateway does not answer, or something else does.
    """
    previous: Mapping[str, Any] | None = None
    try:
        while True:
            try:
                current = _endpoints(admin_url)
            except (OSError, ValueError, HTTPException) as exc:
                print(f"admin port {admin_url} does not answer: {exc}", file=sys.stderr)
                return 1
            try:
                page = (
                    escaped_json(orjson.dumps(current)) + "\n"
                    if as_json
                    else render_endpoints(current, previous)
                )
            except UNREADABLE:
                print(foreign(admin_url), file=sys.stderr)
                return 1
            clear = _HOME_AND_CLEAR if sys.stdout.isatty() and not once and not as_json else ""
            print(clear + page, end="", flush=True)
            if once:
                return 0
            previous = current
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return 0


def render_endpoints(current: Mapping[str, Any], previous: Mapping[str, Any] | None = None) -> str:
    """The table as text.

    Args:
        current: The admin port's `/endpoints` answer.
        previous: An earlier answer of the same process, from which rates are taken; None shows none, nor do
            totals that began anew: of an endpoint that was away, of a worker that died.
    """
    served_before: dict[str, int] = {}
    elapsed_s = 0.0
    if previous is not None:
        elapsed_s = current["uptime_s"] - previous["uptime_s"]
        served_before = {row["key"]: row["served_total"] for row in previous["endpoints"]}
    rows = [list(_COLUMNS)]
    for row in sorted(current["endpoints"], key=lambda row: (row["cluster"], row["key"])):
        before = served_before.get(row["key"])
        rate = "-"
        if before is not None and elapsed_s > 0 and row["served_total"] >= before:
            rate = f"{(row['served_total'] - before) / elapsed_s:.1f}"
        ttft_s, capacity_blocks = row["ttft_ewma_s"], row["capacity_blocks"]
        rows.append(
            [
                row["key"],
                row["cluster"],
                row["source"],
                row["state"],
                str(row["requests"]),
                str(row["prefill_tokens"]),
                str(row["context_tokens"]),
                f"{100 * row['cached_blocks'] / capacity_blocks:.0f}%" if capacity_blocks else "-",
                "-" if ttft_s is None else f"{ttft_s * 1e3:.0f}",
                rate,
                str(row["served_total"]),
                str(row["failures_total"]),
                str(row["weight"]),
                " ".join(f"{name}={value}" for name, value in sorted(row["labels"].items())) or "-",
                row["reason"] or "",
            ]
        )
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if name in _LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    summary = printable(
        f"tokenway   up {current['uptime_s']:.0f} s   workers {current['workers']}   "
        f"in flight {current['in_flight']}   held {current['held']}   endpoints {len(current['endpoints'])}"
    )
    return "\n".join([summary, *_sources(current), *_store(current), "", *lines]) + "\n"


def _sources(current: Mapping[str, Any]) -> list[str]:
    """A line for each control plane that lists endpoints."""
    return [
        printable(
            f"source {name}   in sync"
            if source["connected"] and not source["age_s"]
            else f"source {name}   last in sync {source['age_s']:.0f} s ago"
        )
        for name, source in sorted(current["sources"].items())
    ]


_STORE_STATES: Final = {
    "not_joined": "not joined for {} s",
    "lost": "lost {} s ago",
    "not_writable": "takes nothing for {} s",
    "emptied": "emptied {} s ago",
}
"""By what `/endpoints` says of the store where gateways meet."""


def _store(current: Mapping[str, Any]) -> list[str]:
    """A line if something is wrong with it, none where this gateway meets no other."""
    store = current["store"]
    if store is None or store["reason"] is None:
        return []
    state = _STORE_STATES.get(store["state"], store["state"] + " for {} s").format(f"{store['for_s']:.0f}")
    some = store.get("workers", current["workers"])
    where = "" if some == current["workers"] else f" at {some} of {current['workers']} workers"
    return [printable(f"store   {state}{where}: {store['reason']}")]


def _endpoints(admin_url: str) -> dict[str, Any]:
    answer: dict[str, Any] = fetch(f"{admin_url.rstrip('/')}/endpoints")
    return answer
