"""A Kubernetes API with nothing in it: every list is empty, every watch silent, nothing can be written.

For istiod on files. The one that we build uses the client of a Kubernetes API when it reads ServiceEntries,
and crashes without one, although it reads no configuration from there.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import yaml
from aiohttp import web

VERSION: Final = {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
LISTED_AT: Final = {"resourceVersion": "1"}
METADATA: Final = "PartialObjectMetadataList"


class EmptyKubernetes:
    """The server, on a free port of loopback, in the event loop that starts it."""

    def __init__(self) -> None:
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def write_kubeconfig(self, path: Path) -> None:
        """How it is reached."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "empty", "cluster": {"server": f"http://127.0.0.1:{self._port}"}}],
            "users": [{"name": "empty", "user": {}}],
            "contexts": [{"name": "empty", "context": {"cluster": "empty", "user": "empty"}}],
            "current-context": "empty",
        }
        path.write_text(yaml.safe_dump(config))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        words = request.match_info["path"].split("/")
        if words == ["version"]:
            return web.json_response(VERSION)
        if request.method != "GET":
            return _refused(403, "Forbidden")
        if "sendInitialEvents" in request.query:
            return _refused(400, "BadRequest")  # a client then lists first
        if request.query.get("watch") in ("1", "true"):
            return await _silence(request)
        if not _is_list(words):
            return _refused(404, "NotFound")
        listed: dict[str, Any] = {"metadata": LISTED_AT, "items": []}
        if METADATA in request.headers.get("accept", ""):
            listed |= {"kind": METADATA, "apiVersion": "meta.k8s.io/v1"}
        return web.json_response(listed)


def _is_list(words: list[str]) -> bool:
    """The path names a kind, not an object."""
    rest = words[2:] if words[0] == "api" else words[3:]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    return len(rest) == 1


def _refused(code: int, reason: str) -> web.Response:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code}
    return web.json_response(status, status=code)


async def _silence(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(request)
    await asyncio.sleep(float(request.query.get("timeoutSeconds", 300)))
    return response
