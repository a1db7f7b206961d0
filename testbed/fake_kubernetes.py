"""A fake of the Kubernetes API: lists and watches of objects in memory, with the faults of real servers.

It is no API server: nothing is validated, users are authorised by a list of tokens alone, and only what
Tokenway asks is answered. What is hard to provoke at a real one is a word here: pages whose token expired,
410 in both forms, watches that are cut or fall silent, tokens that are refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web

Objects = dict[str, dict[str, Any]]
"""By name."""


@dataclass(slots=True)
class _Watcher:
    """A watch that runs."""

    path: str
    labels: dict[str, str]
    name: str | None
    queue: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)


class FakeKubernetes:
    """The fake.

    Args:
        page_most: Objects of a page, whatever the client asks for.

    Attributes:
        requests: Path and query of what was asked, in order.
        tokens: Those that are accepted; None accepts all.
        refuse: Status and headers of the next answers, by whether a watch is asked for; used up in order.
        missing: Paths of kinds that are not there, with the status that says so.
    """

    def __init__(self, page_most: int = 500) -> None:
        self._page_most = page_most
        self._objects: dict[str, Objects] = {}
        self._log: list[tuple[int, str, str, dict[str, Any], dict[str, Any] | None]] = []
        self._version = 1000
        self._oldest = 1000
        self._watchers: list[_Watcher] = []
        self._pages: dict[str, tuple[int, list[dict[str, Any]]]] = {}
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._changed = asyncio.Event()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.tokens: set[str] | None = None
        self.refuse: dict[bool, deque[tuple[int, Mapping[str, str]]]] = {False: deque(), True: deque()}
        self.missing: dict[str, int] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def num_watches(self) -> int:
        """That run now."""
        return len(self._watchers)

    async def start(self) -> None:
        """Listen, at the port of the first start."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Cut all watches and listen no more; objects stay."""
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def put(self, path: str, said: dict[str, Any]) -> None:
        """Make an object, or change it: `path` is that of its collection."""
        self._version += 1
        name = said["metadata"]["name"]
        now = {**said, "metadata": {**said["metadata"], "resourceVersion": str(self._version)}}
        of_path = self._objects.setdefault(path, {})
        before, of_path[name] = of_path.get(name), now
        self._publish(path, "MODIFIED" if before is not None else "ADDED", now, before)

    def delete(self, path: str, name: str) -> None:
        """Take an object away."""
        self._version += 1
        gone = self._objects[path].pop(name)
        gone = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}}
        self._publish(path, "DELETED", gone, gone)

    def compact(self) -> None:
        """Forget what was: versions before now are too old, and so are tokens of pages."""
        self._oldest = self._version
        self._log.clear()
        self._pages.clear()

    def cut(self) -> None:
        """End all watches without a word."""
        self.send(None)

    def send(self, line: bytes | None) -> None:
        """Say a line to all watches; None ends them."""
        for watcher in list(self._watchers):
            watcher.queue.put_nowait(line)

    def expire(self) -> None:
        """End all watches with 410."""
        self.send(
            orjson.dumps({"type": "ERROR", "object": {"kind": "Status", "reason": "Expired", "code": 410}})
        )
        self.send(None)

    def bookmark(self) -> None:
        """Say to all watches how far they are."""
        about = {"metadata": {"resourceVersion": str(self._version)}}
        self.send(orjson.dumps({"type": "BOOKMARK", "object": about}))

    async def watched(self, count: int) -> None:
        """Wait until so many watches run."""
        while len(self._watchers) < count:
            self._changed.clear()
            await self._changed.wait()

    async def asked(self, count: int) -> None:
        """Wait until so many requests have come, of all time."""
        while len(self.requests) < count:
            self._changed.clear()
            await self._changed.wait()

    def _publish(self, path: str, kind: str, now: dict[str, Any], before: dict[str, Any] | None) -> None:
        self._log.append((self._version, path, kind, now, before))
        for watcher in self._watchers:
            line = _line(watcher, path, kind, now, before)
            if line is not None:
                watcher.queue.put_nowait(line)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests.append((request.path, query))
        self._changed.set()
        is_watch = query.get("watch") == "1"
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return _status(401, "Unauthorized")
        if request.path in self.missing:
            return _status(self.missing[request.path], "NotFound")
        if self.refuse[is_watch]:
            status, headers = self.refuse[is_watch].popleft()
            return _status(status, "Whatever", headers)
        if is_watch:
            return await self._watch(request, query)
        return self._list(request.path, query)

    def _list(self, path: str, query: dict[str, str]) -> web.Response:
        token = query.get("continue", "")
        if token:
            if token not in self._pages:
                return _status(410, "Expired")
            version, items = self._pages.pop(token)
        else:
            labels, name = _selection(query)
            items = [
                one for _, one in sorted(self._objects.get(path, {}).items()) if _is_of(one, labels, name)
            ]
            version = self._version
        most = min(self._page_most, int(query.get("limit", "500")))
        metadata = {"resourceVersion": str(version)}
        if items[most:]:
            metadata["continue"] = f"t{version}.{len(self._pages)}.{len(items)}"
            self._pages[metadata["continue"]] = version, items[most:]
        return web.Response(
            body=orjson.dumps({"kind": "List", "metadata": metadata, "items": items[:most]}),
            content_type="application/json",
        )

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        version = int(query["resourceVersion"])
        if version < self._oldest:
            return _status(410, "Expired")
        labels, name = _selection(query)
        watcher = _Watcher(request.path, labels, name)
        for at, path, kind, now, before in self._log:
            line = None if at <= version else _line(watcher, path, kind, now, before)
            if line is not None:
                watcher.queue.put_nowait(line)
        self._watchers.append(watcher)
        response = web.StreamResponse()
        response.content_type = "application/json"
        try:
            await response.prepare(request)
            self._changed.set()
            while (line := await watcher.queue.get()) is not None:
                await response.write(line + b"\n")
        finally:
            self._watchers.remove(watcher)
        return response


def _status(code: int, reason: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = orjson.dumps({"kind": "Status", "status": "Failure", "reason": reason, "code": code})
    return web.Response(status=HTTPStatus(code), body=body, headers=headers, content_type="application/json")


def _selection(query: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    labels = dict(word.split("=", 1) for word in query.get("labelSelector", "").split(",") if word)
    _, found, name = query.get("fieldSelector", "").partition("metadata.name=")
    return labels, name if found else None


def _is_of(said: dict[str, Any] | None, labels: Mapping[str, str], name: str | None) -> bool:
    if said is None or (name is not None and said["metadata"]["name"] != name):
        return False
    has = said["metadata"].get("labels", {})
    return all(has.get(key) == value for key, value in labels.items())


def _line(
    watcher: _Watcher, path: str, kind: str, now: dict[str, Any], before: dict[str, Any] | None
) -> bytes | None:
    """What a watch reports of a change; an object that is selected no more is gone for it."""
    if path != watcher.path:
        return None
    was, is_now = _is_of(before, watcher.labels, watcher.name), _is_of(now, watcher.labels, watcher.name)
    if kind == "MODIFIED" and was is not is_now:
        kind = "ADDED" if is_now else "DELETED"
    elif not is_now:
        return None
    return orjson.dumps({"type": kind, "object": now})
