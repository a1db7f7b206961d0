"""The metadata-center API on a TCP port: bytes in, `Api`, bytes out.

One event loop owns the state and answers without awaiting in between, so calls are atomic and in the order
their bodies arrived. Messages go to followers before the next call, so that is the order they see.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from metadata_center.addresses import Address, is_loopback
from metadata_center.service.api import Api, route
from metadata_center.service.calls import (
    MAX_BODY_BYTES,
    TRACE_HEADER,
    Code,
    RefusedError,
    ServiceRequest,
    ServiceResponse,
)
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.followers import MAX_FOLLOWERS, Followers
from metadata_center.service.http_callers import refusal
from metadata_center.service.metrics import Metrics
from metadata_center.service.opening import not_opened
from metadata_center.service.operator_calls import LogLevel
from metadata_center.service.rendezvous import AIGW_LEASE_S
from metadata_center.service.state import ServiceState

_LOGGER: Final = logging.getLogger("metadata_center")

_LEVELS: Final[Mapping[LogLevel, int]] = {
    LogLevel.TRACE: logging.DEBUG,  # nothing here is finer
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARN: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.FATAL: logging.CRITICAL,
}

_EXPIRE_INTERVAL_S: Final = AIGW_LEASE_S / 3
"""Every call expires what is due; this keeps the backlog of a quiet hour small, and AIGW's share alive."""

_CHANGES_INTERVAL_S: Final = 0.005
"""What AIGW's callers change is sent together this often: they send a call per request and change, after the
fact, and each message goes to every follower."""

_STOP_S: Final = 5.0
"""For calls under way when the server stops; they take milliseconds, a slow sender's body may not."""

_FLUSH_S: Final = 1.0  # for answers already made to leave: they are small

_AIGW_TRACE_HEADER: Final = "TraceId"  # what AIGW's client sends, often empty
_TRACE_ID: Final = re.compile(r"[!-~]{1,128}")


class HttpServer:
    """The service: state, API and port.

    Args:
        limits: Lifetimes and bounds of what is remembered.
        token: Required as bearer token; None requires none.
    """

    def __init__(self, limits: Limits, *, token: str | None = None) -> None:
        self.state = ServiceState(limits, zero_unix_ns=time.time_ns() - time.monotonic_ns())
        self.followers = Followers()
        self._registry = CollectorRegistry()
        self._metrics = Metrics(self._registry, self.state, self.followers)
        self._api = Api(self.state, self, token=token)
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._expiring: asyncio.Task[None] | None = None
        self._adding: asyncio.TimerHandle | None = None
        self._host = ""
        self.port = 0
        """The TCP port, once started."""

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 picks one.

        Raises:
            OSError: The address cannot be bound; names it.
        """
        self._host = host.lower()
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_FLUSH_S)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host, port)
        try:
            await self._site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise not_opened(error, Address(host, port)) from error
        self.port = self._runner.addresses[0][1]
        self._expiring = asyncio.create_task(self._expire())
        _LOGGER.info("metadata center listening", extra={"host": host, "port": self.port})

    async def stop(self) -> None:
        """Accept no more, let calls under way finish for 5 s at most, close. Once is enough."""
        runner, site, expiring = self._runner, self._site, self._expiring
        self._runner = self._site = self._expiring = None
        if runner is None or site is None or expiring is None:
            return
        await site.stop()
        self.followers.end()
        # aiohttp's own wait comes after it stopped reading: a body half sent would never be complete.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _STOP_S)
        await runner.cleanup()
        if self._adding is not None:
            self._adding.cancel()
        expiring.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await expiring
        _LOGGER.info("metadata center stopped")

    def metrics_text(self) -> bytes:
        """The Prometheus exposition."""
        return generate_latest(self._registry)

    def set_log_level(self, level: LogLevel) -> None:
        """Log from this level on; DEBUG has a line for every answer."""
        _LOGGER.setLevel(_LEVELS[level])
        _LOGGER.info("log level set", extra={"threshold": level})

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRE_INTERVAL_S)
            now_s = time.monotonic()
            self.state.advance(now_s)
            self.state.rendezvous.renew(now_s)
            self.followers.send(self.state.rendezvous.take_messages())

    def _send_messages(self) -> None:
        """Pass on what the last call published; AIGW's changes with the next few."""
        rendezvous = self.state.rendezvous
        self.followers.send(rendezvous.take_messages())
        if self._adding is None and self.followers and rendezvous.has_news:
            loop = asyncio.get_running_loop()
            self._adding = loop.call_later(_CHANGES_INTERVAL_S, self._send_changes)

    def _send_changes(self) -> None:
        self._adding = None
        self.state.rendezvous.add_changes()
        self.followers.send(self.state.rendezvous.take_messages())

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        self._calls += 1
        self._idle.clear()
        try:
            return await self._respond(http)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def _respond(self, http: web.Request) -> web.StreamResponse:
        trace_id = _trace_id(http.headers)
        method, path = http.method, http.rel_url.raw_path
        why_not = self._refusal(http)
        if why_not is None:
            answer = await self._heard(http, trace_id)
        else:
            answer = RefusedError(Code.FORBIDDEN, why_not).answer(trace_id)
        known_method, known_path = route(method, path)
        self._metrics.count(known_method, known_path, answer.status)
        if _LOGGER.isEnabledFor(logging.DEBUG):
            _LOGGER.debug(
                "answered",
                extra={
                    "method": known_method,
                    "path": known_path,
                    "status": answer.status,
                    "trace_id": trace_id,
                },
            )
        if answer.follows:
            return await self.followers.follow(http, answer)
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    async def _heard(self, http: web.Request, trace_id: str) -> ServiceResponse:
        try:
            body = await http.read()
        except web.HTTPRequestEntityTooLarge:
            return RefusedError(Code.BODY_TOO_LARGE, f"accepted: {MAX_BODY_BYTES} bytes").answer(trace_id)
        except (web.RequestPayloadError, ConnectionError):  # cut short, or not in its Content-Encoding
            return RefusedError(Code.INVALID_INPUT, "invalid body").answer(trace_id)
        return self._answer(
            ServiceRequest(
                http.method,
                http.rel_url.raw_path,
                trace_id,
                http.rel_url.raw_query_string,
                body,
                http.headers.get("Authorization"),
                http.headers.get("Event-Type"),
            )
        )

    def _refusal(self, http: web.Request) -> str | None:
        """Why a caller is not heard: it is a web page (`http_callers`)."""
        ours = None if http.transport is None else http.transport.get_extra_info("sockname")
        if not isinstance(ours, tuple):
            return None
        return refusal(
            http.headers.getall("Host", []),
            http.headers.getall("Origin", []),
            http.headers.get("Sec-Fetch-Site"),
            reached=ours[0],
            only_loopback=self._host == "localhost" or is_loopback(self._host),
            names=(self._host,),
        )

    def _answer(self, request: ServiceRequest) -> ServiceResponse:
        try:
            answer = self._api.answer(request, time.monotonic())
            self._send_messages()
        except Exception:
            _LOGGER.exception("metadata call failed")
            return RefusedError(Code.INTERNAL, "see the log").answer(request.trace_id)
        if answer.follows and len(self.followers) >= MAX_FOLLOWERS:
            return RefusedError(Code.TOO_MUCH, f"{MAX_FOLLOWERS} follow already").answer(request.trace_id)
        return answer


def _trace_id(headers: Mapping[str, str]) -> str:
    """The caller's trace id if it can be echoed as a header, else a new one."""
    for name in (_AIGW_TRACE_HEADER, TRACE_HEADER):
        found = headers.get(name, "")
        if _TRACE_ID.fullmatch(found):
            return found
    return uuid.uuid4().hex
