"""The operator's port: metrics, readiness, endpoints, explain. No prompt text exists behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web

from extproc.observing.explain import to_json
from extproc.routing.state import State
from metadata_center.types import RequestId

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_MAX_LAST = 10_000
"""Records one answer may hold; a record of 1,000 candidates is about 300 KB."""


def json_response(body: object, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(
        body=orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
        status=status,
        content_type="application/json",
    )


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
        runner = await self._start()
        site = web.TCPSite(runner, address, port)
        await site.start()
        self.port = runner.addresses[0][1]

    async def start_unix(self, path: Path) -> None:
        """Listen on a Unix socket, for the supervisor."""
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - once, at the start
        await web.UnixSite(await self._start(), str(path)).start()

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/endpoints", self._endpoints)
        app.router.add_get("/explain", self._last)
        app.router.add_get("/explain/{request_id}", self._explain)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        return self._runner

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics_text(), headers={"content-type": METRICS_TYPE})

    async def _healthz(self, _: web.Request) -> web.Response:
        return json_response({"status": "alive"})

    async def _readyz(self, _: web.Request) -> web.Response:
        ready = self._ready()
        return json_response({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _endpoints(self, _: web.Request) -> web.Response:
        return json_response(self._endpoints_json())

    async def _last(self, request: web.Request) -> web.Response:
        text = request.query.get("last", "1")
        if not text.isdigit() or not 1 <= int(text) <= _MAX_LAST:
            return json_response({"error": f"last must be 1..{_MAX_LAST}"}, 400)
        return json_response({"records": [to_json(record) for record in self._state.records.last(int(text))]})

    async def _explain(self, request: web.Request) -> web.Response:
        record = self._state.records.get(RequestId(request.match_info["request_id"]))
        if record is None:
            return json_response({"error": "no such request is held"}, 404)
        return json_response(to_json(record))
