"""What answers a page: one worker for itself, or all workers of a gateway together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import aiohttp
from yarl import URL

from extproc.admin.page import PageRequest, PageResponse, Source, WorkerPage

_ASK_TIMEOUT: Final = aiohttp.ClientTimeout(total=2.0)


class Answering(Protocol):
    """What answers a page."""

    async def answer(self, page: WorkerPage, request: PageRequest) -> PageResponse:
        """The answer to a request that the page does not refuse."""


class OneWorker:
    """A worker answers by what it knows itself.

    Args:
        source: What that is.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    async def answer(self, page: WorkerPage, request: PageRequest) -> PageResponse:
        """See `Answering`; between two pieces of an answer requests go on."""
        answer = page.answer(self._source, request)
        if isinstance(answer, PageResponse):
            return answer
        pieces = []
        for piece in answer.pieces:
            pieces.append(piece)
            await asyncio.sleep(0)
        return PageResponse(b"", answer.content_type, rest=tuple(pieces))


class AllWorkers:
    """A supervisor asks its workers at once and merges what those say that answer in time.

    Args:
        sockets: The admin sockets of the workers, in their order.
    """

    def __init__(self, sockets: Sequence[Path]) -> None:
        self._sockets = tuple(sockets)

    async def answer(self, page: WorkerPage, request: PageRequest) -> PageResponse:
        """See `Answering`."""
        answers = await asyncio.gather(*(self._ask(socket, page, request) for socket in self._sockets))
        return page.merge(request, {i: answer for i, answer in enumerate(answers) if answer is not None})

    @staticmethod
    async def _ask(socket: Path, page: WorkerPage, request: PageRequest) -> PageResponse | None:
        """What one says; None if it does not."""
        connector = aiohttp.UnixConnector(str(socket))
        url = URL(f"http://worker{request.target}", encoded=True)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=_ASK_TIMEOUT) as session,
                session.request(page.method, url) as response,
            ):
                content_type = response.headers.get("content-type", "")
                return PageResponse(await response.read(), content_type, response.status)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
