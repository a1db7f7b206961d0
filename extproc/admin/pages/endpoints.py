"""`GET /endpoints`: what `tokenway top` shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from extproc.admin.page import (
    PageRequest,
    PageResponse,
    Source,
    WorkerPage,
    good_bodies,
    json_answer,
    no_worker,
)

_TOTALS: Final = ("served_total", "failures_total")


def _of_worker(source: Source, _: PageRequest) -> PageResponse:
    return json_answer(source.endpoints_json())


def _of_all(_: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    """Load is shared: each worker sees all of it. What is each worker's own is added up.

    A source is as old as it is to the worker that has not heard of it for longest; so is a fault of the
    store.
    """
    bodies = good_bodies(answers)
    if not bodies:
        return no_worker()
    merged: dict[str, Any] = bodies[0]
    merged["in_flight"] = sum(body["in_flight"] for body in bodies)
    merged["held"] = sum(body["held"] for body in bodies)
    merged["workers"] = len(bodies)
    merged["sources"] = {
        name: {
            "connected": all(source["connected"] for source in of_workers),
            "age_s": max(source["age_s"] for source in of_workers),
        }
        for name in merged["sources"]
        if (of_workers := [body["sources"][name] for body in bodies if name in body["sources"]])
    }
    merged["store"] = _store([body["store"] for body in bodies])
    totals = [_totals(body) for body in bodies]
    for row in merged["endpoints"]:
        for name in _TOTALS:
            row[name] = sum(of_worker[row["key"]][name] for of_worker in totals if row["key"] in of_worker)
    return json_answer(merged)


def _store(of_workers: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """What one worker has to say of it for longest, and how many have something to say."""
    known = [store for store in of_workers if store is not None]
    if not known:
        return None
    faulty = [store for store in known if store["reason"] is not None]
    return {**max(faulty or known, key=lambda store: store["for_s"]), "workers": len(faulty)}


def _totals(body: Mapping[str, Any]) -> dict[str, Mapping[str, int]]:
    """What one worker counted, by endpoint: workers heard of clusters in orders of their own."""
    return {row["key"]: row for row in body["endpoints"]}


ENDPOINTS = WorkerPage("GET", "/endpoints", _of_worker, _of_all)
