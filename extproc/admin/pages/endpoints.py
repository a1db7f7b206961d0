"""`GET /endpoints`: what `tokenway top` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.admin.page import (
    PageRequest,
    PageResponse,
    Source,
    WorkerPage,
    good_bodies,
    json_answer,
    no_worker,
)


def _of_worker(source: Source, _: PageRequest) -> PageResponse:
    return json_answer(source.endpoints_json())


def _of_all(_: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    """Load is shared: each worker sees all of it. What is each worker's own is added up.

    A source is as old as it is to the worker that has not heard of it for longest.
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
    for i, row in enumerate(merged["endpoints"]):
        for total in ("served_total", "failures_total"):
            row[total] = sum(
                body["endpoints"][i][total]
                for body in bodies
                if i < len(body["endpoints"]) and body["endpoints"][i]["key"] == row["key"]
            )
    return json_answer(merged)


ENDPOINTS = WorkerPage("GET", "/endpoints", _of_worker, _of_all)
