"""`GET /explain?last=N`: the newest decision records. `GET /explain/{request_id}`: one of them, or 404."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from extproc.admin.page import (
    PagePieces,
    PageRequest,
    PageResponse,
    Source,
    WorkerPage,
    good_bodies,
    json_answer,
    no_worker,
)
from extproc.observing.explain import to_json
from metadata_center.types import RequestId

_MAX_LAST = 500
"""Records one answer may hold; a record of 1,000 candidates is about 80 KB, so 40 MB at most."""


def last_asked_for(request: PageRequest) -> int | None:
    """`last=N` of a request, 1 if it is left out; None if it is no number of records."""
    text = request.query.get("last", "1")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_LAST))):
        return None
    return int(text) if 1 <= int(text) <= _MAX_LAST else None


def _refuse_last(request: PageRequest) -> PageResponse | None:
    if last_asked_for(request) is None:
        return json_answer({"error": f"last must be 1..{_MAX_LAST}"}, 400)
    return None


def _last_of_worker(source: Source, request: PageRequest) -> PagePieces:
    return PagePieces(_in_pieces(source, last_asked_for(request) or 1))


def _in_pieces(source: Source, last: int) -> Iterator[bytes]:
    """One piece for each record, which is recomputed to be shown."""
    between = b'{"records":['
    for record in source.records.last(last):
        yield between + json_answer(to_json(record)).body
        between = b","
    yield b"]}" if between == b"," else between + b"]}"


def _last_of_all(request: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    bodies = good_bodies(answers)
    if not bodies:
        return no_worker()
    dated = [each for body in bodies for each in _dated(body["records"])]
    dated.sort(key=lambda each: each[0], reverse=True)
    return json_answer({"records": [record for _, record in dated[: last_asked_for(request)]]})


def _dated(records: list[dict[str, Any]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """A worker's records, newest first, each with a time not after that of the one before.

    Where the clock was set back an older one has the later time by its own words.
    """
    latest_s = inf
    for record in records:
        latest_s = min(latest_s, record["time_unix_s"])
        yield latest_s, record


def _not_held() -> PageResponse:
    return json_answer({"error": "no decision of that id is remembered"}, 404)


def _one_of_worker(source: Source, request: PageRequest) -> PageResponse:
    record = source.records.get(RequestId(request.segments["request_id"]))
    return _not_held() if record is None else json_answer(to_json(record))


def _one_of_all(_: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    return next((answer for answer in answers.values() if answer.status == 200), _not_held())


LAST = WorkerPage("GET", "/explain", _last_of_worker, _last_of_all, _refuse_last)
EXPLAIN = WorkerPage("GET", "/explain/{request_id}", _one_of_worker, _one_of_all)
