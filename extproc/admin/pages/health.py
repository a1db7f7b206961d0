"""`GET /healthz`: the process lives. `GET /readyz`: new requests are taken, 503 if not."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.admin.page import PageRequest, PageResponse, ProcessPage, Source, WorkerPage, json_answer


def _alive(_: PageRequest) -> PageResponse:
    return json_answer({"status": "alive"})


def _ready(is_ready: bool, **more: int) -> PageResponse:
    status = "ready" if is_ready else "not ready"
    return json_answer({"status": status, **more}, 200 if is_ready else 503)


def _of_worker(source: Source, _: PageRequest) -> PageResponse:
    return _ready(source.is_ready())


def _of_all(_: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    ready = sum(answer.status == 200 for answer in answers.values())
    return _ready(ready > 0, workers_ready=ready)


HEALTHZ = ProcessPage("GET", "/healthz", _alive)
READYZ = WorkerPage("GET", "/readyz", _of_worker, _of_all)
