"""`GET /metrics`: the Prometheus exposition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from extproc.admin.page import PagePieces, PageRequest, PageResponse, Source, WorkerPage
from extproc.observing.metrics.merge import merge

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def _of_worker(source: Source, _: PageRequest) -> PagePieces:
    return PagePieces(source.metrics_pieces(), METRICS_TYPE)


def _of_all(_: PageRequest, answers: Mapping[int, PageResponse]) -> PageResponse:
    text = merge({worker: answer.body.decode() for worker, answer in answers.items()})
    return PageResponse(text.encode(), METRICS_TYPE)


METRICS = WorkerPage("GET", "/metrics", _of_worker, _of_all)
