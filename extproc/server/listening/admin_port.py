"""The admin port over HTTP: for programs, not for web pages (`metadata_center.service.http_callers`)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from extproc.admin.page import Page, PageRequest, PageResponse, ProcessPage, json_answer
from extproc.server.listening.admin_answers import Answering
from extproc.server.listening.run_dir import closed_to_others
from metadata_center.addresses import Address, is_loopback
from metadata_center.service.http_callers import refusal
from metadata_center.service.opening import not_opened

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_SENT_AT_ONCE: Final = 64 * 1024
"""Bytes of an answer that are put together and sent before other requests go on."""


@dataclass(frozen=True, slots=True)
class TcpPlace:
    """Where operators find the port.

    Attributes:
        address: An IP address.
        port: 0 picks one.
    """

    address: str
    port: int


def _response(answer: PageResponse) -> web.Response:
    body = b"".join((answer.body, *answer.rest))
    return web.Response(body=body, status=answer.status, headers={"content-type": answer.content_type})


async def _respond(request: web.Request, answer: PageResponse) -> web.StreamResponse:
    """Send an answer; a long one piece by piece, between which other requests go on."""
    size = len(answer.body) + sum(map(len, answer.rest))
    if size <= _SENT_AT_ONCE or request.method == "HEAD":
        return _response(answer)
    response = web.StreamResponse(status=answer.status, headers={"content-type": answer.content_type})
    response.content_length = size
    await response.prepare(request)
    waiting = bytearray(answer.body)
    for piece in answer.rest:
        waiting += piece
        if len(waiting) >= _SENT_AT_ONCE:
            await response.write(bytes(waiting))
            waiting.clear()
            await asyncio.sleep(0)
    await response.write_eof(bytes(waiting))
    return response


def _handler(page: Page, answering: Answering) -> _Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        page_request = PageRequest(request.match_info, request.query, request.rel_url.raw_path_qs)
        if isinstance(page, ProcessPage):
            return _response(page.answer(page_request))
        answer = page.refuse(page_request) or await answering.answer(page, page_request)
        return await _respond(request, answer)

    return handle


class AdminPort:
    """Serves pages. A part of a process: started once, stopped once.

    Args:
        pages: Which.
        answering: Answers the pages that ask workers.
        place: Where to listen; a path is a Unix socket, for the supervisor alone.
    """

    def __init__(self, pages: Iterable[Page], answering: Answering, place: TcpPlace | Path) -> None:
        self._place = place
        self._app = web.Application(middlewares=[self._guarded])
        for page in pages:
            handler = _handler(page, answering)
            if page.method == "GET":
                self._app.router.add_get(page.path, handler)  # and HEAD
            else:
                self._app.router.add_route(page.method, page.path, handler)
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The place is taken, or not ours; names it.
        """
        self._runner = web.AppRunner(self._app, access_log=None)
        await self._runner.setup()
        if isinstance(self._place, TcpPlace):
            try:
                await web.TCPSite(self._runner, self._place.address, self._place.port).start()
            except OSError as error:
                raise not_opened(error, Address(self._place.address, self._place.port)) from error
            self.port = self._runner.addresses[0][1]
            return
        self._place.unlink(missing_ok=True)
        await self._listen(self._runner, self._place)

    async def renew(self) -> None:
        """Listen anew at a socket whose name leads nowhere. Raises OSError if that cannot be."""
        if self._runner is not None and isinstance(self._place, Path):
            before = self._site
            await self._listen(self._runner, self._place)
            if before is not None:
                await before.stop()

    async def _listen(self, runner: web.AppRunner, path: Path) -> None:
        listening = socket.socket(socket.AF_UNIX)
        try:
            with closed_to_others():
                listening.bind(str(path))
        except OSError:
            listening.close()
            raise
        self._site = web.SockSite(runner, listening)
        await self._site.start()

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Refuse what a web page may have sent; a Unix socket is guarded by its mode."""
        ours = None if request.transport is None else request.transport.get_extra_info("sockname")
        if isinstance(ours, tuple) and isinstance(self._place, TcpPlace):
            why_not = refusal(
                request.headers.getall("Host", []),
                request.headers.getall("Origin", []),
                request.headers.get("Sec-Fetch-Site"),
                reached=ours[0],
                only_loopback=is_loopback(self._place.address),
            )
            if why_not is not None:
                return _response(json_answer({"error": why_not}, 403))
        return await handler(request)
