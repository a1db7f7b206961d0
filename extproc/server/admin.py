"""The operator's port: metrics, readiness, endpoints, explain. No prompt text exists behind it."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import orjson
from aiohttp import web

from extproc.observing.explain import to_json
from extproc.routing.state import State
from extproc.server.run_dir import closed_to_others
from metadata_center.service.http_callers import is_loopback, refusal
from metadata_center.types import RequestId

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_MAX_LAST = 500
"""Records one answer may hold; a record of 1,000 candidates is about 80 KB, so 40 MB at most."""


def json_response(body: object, status: int = 200) -> web.Response:
    """An answer in JSON."""
    try:
        data = orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except (
        TypeError
    ):  # an integer of over 64 bits: all are bounded where they come from, an operator must see
        data = json.dumps(body, default=str).encode()
    return web.Response(
        body=data,
        status=status,
        content_type="application/json",
    )


class AdminSurface(Protocol):
    """Who answers on the admin port: a worker for itself, or a supervisor for all."""

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics."""

    async def healthz(self, _: web.Request) -> web.Response:
        """GET /healthz."""

    async def readyz(self, _: web.Request) -> web.Response:
        """GET /readyz."""

    async def endpoints(self, _: web.Request) -> web.Response:
        """GET /endpoints."""

    async def last(self, request: web.Request) -> web.Response:
        """GET /explain?last=N."""

    async def explain(self, request: web.Request) -> web.Response:
        """GET /explain/{request_id}."""


def last_asked_for(request: web.Request) -> int | None:
    """`last=N` of a request, 1 if it is left out; None if it is no number of records."""
    text = request.query.get("last", "1")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_LAST))):
        return None
    return int(text) if 1 <= int(text) <= _MAX_LAST else None


def refuse_last() -> web.Response:
    """The answer to a `last` that is none."""
    return json_response({"error": f"last must be 1..{_MAX_LAST}"}, 400)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(surface: AdminSurface, address: str | None = None) -> web.Application:
    """The admin port's paths, for programs and not for web pages (`metadata_center.service.http_callers`).

    Args:
        surface: Who answers.
        address: The IP address that is listened on; None is a Unix socket.
    """

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        transport = request.transport
        ours = None if transport is None else transport.get_extra_info("sockname")
        if isinstance(ours, tuple):
            why_not = refusal(
                request.headers.getall("Host", []),
                request.headers.getall("Origin", []),
                request.headers.get("Sec-Fetch-Site"),
                reached=ours[0],
                only_loopback=address is not None and is_loopback(address),
            )
            if why_not is not None:
                return json_response({"error": why_not}, 403)
        return await handler(request)

    app = web.Application(middlewares=[guarded])
    app.router.add_get("/metrics", surface.metrics)
    app.router.add_get("/healthz", surface.healthz)
    app.router.add_get("/readyz", surface.readyz)
    app.router.add_get("/endpoints", surface.endpoints)
    app.router.add_get("/explain", surface.last)
    app.router.add_get("/explain/{request_id}", surface.explain)
    return app


class Admin:
    """HTTP over what one worker knows.

    Args:
        state: Its books.
        metrics_text: Its Prometheus exposition.
        endpoints_json: The body of `/endpoints`.
        ready: True while it takes new requests.
    """

    def __init__(
        self,
        state: State,
        metrics_text: Callable[[], bytes],
        endpoints_json: Callable[[], dict[str, Any]],
        ready: Callable[[], bool],
    ) -> None:
        self._state = state
        self._metrics_text = metrics_text
        self._endpoints_json = endpoints_json
        self._ready = ready
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start_tcp(self, address: str, port: int) -> None:
        """Listen on a TCP port; 0 picks one, see `port`."""
        runner = await self._start(address)
        site = web.TCPSite(runner, address, port)
        await site.start()
        self.port = runner.addresses[0][1]

    async def start_unix(self, path: Path) -> None:
        """Listen on a Unix socket, for the supervisor."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - once, at the start
        runner = await self._start(None)
        listening = socket.socket(socket.AF_UNIX)
        with closed_to_others():
            listening.bind(str(path))
        await web.SockSite(runner, listening).start()

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _start(self, address: str | None) -> web.AppRunner:
        app = application(self, address)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        return self._runner

    async def metrics(self, _: web.Request) -> web.Response:
        """The Prometheus exposition."""
        return web.Response(body=self._metrics_text(), headers={"content-type": METRICS_TYPE})

    async def healthz(self, _: web.Request) -> web.Response:
        """Alive, or there would be no answer."""
        return json_response({"status": "alive"})

    async def readyz(self, _: web.Request) -> web.Response:
        """200 while new requests are taken, else 503."""
        ready = self._ready()
        return json_response({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def endpoints(self, _: web.Request) -> web.Response:
        """What `tokenway top` shows."""
        return json_response(self._endpoints_json())

    async def last(self, request: web.Request) -> web.Response:
        """The most recent decision records, newest first."""
        count = last_asked_for(request)
        if count is None:
            return refuse_last()
        return json_response({"records": [to_json(record) for record in self._state.records.last(count)]})

    async def explain(self, request: web.Request) -> web.Response:
        """One decision record, or 404."""
        record = self._state.records.get(RequestId(request.match_info["request_id"]))
        if record is None:
            return json_response({"error": "no such request is held"}, 404)
        return json_response(to_json(record))
