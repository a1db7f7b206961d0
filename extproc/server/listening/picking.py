"""The endpoint picker of a worker: its gRPC servers, its clock, and how it leaves."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from extproc.config.rule_headers import SECRET_HEADERS
from extproc.config.schema import Config
from extproc.config.sections.listening import EndpointPicker
from extproc.picker.dialect import PickerDialect
from extproc.picker.health import Health
from extproc.picker.service import Picker
from extproc.routing.gateway import Gateway
from extproc.server.listening.rpc_places import Places, health_places, picker_places
from extproc.server.listening.rpc_server import RpcServer, rpc_server
from extproc.server.listening.self_signed import make_self_signed, remove, self_signed_files
from extproc.server.listening.socket_watch import Kept, kept_of
from extproc.transport.http2.faults import FaultReason
from extproc.transport.listen_tls import TlsFiles
from extproc.transport.seam import Rpc
from extproc.values.endings import RequestEvent

TICK_S = 1.0
"""Between looks at streams that wait for a body or run."""

LOOK_S = 0.05
"""Between looks at requests whose ends are not told."""

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Of one message: Envoy cuts bodies into chunks of at most 1 MiB, and headers are less."""

MAX_HEALTH_BYTES = 4_096
"""Of a question for health: a service's name."""

Serve = Callable[[Sequence[Rpc], Places, int], RpcServer]
"""Makes a server of these methods at these places, for messages of so many bytes."""


class Picking:
    """Serves the endpoint-picker protocol.

    Args:
        picker: The protocol.
        settings: Where, and how it leaves.
        serve: Makes the servers.
        places: Where it picks.
        probed: Where it answers for its health alone; nowhere if these name no address.
        made: The certificate to be made at the start; None makes none.
        others: Methods that are served beside it.
        is_ready: True while the worker takes requests.
        is_busy: True while a request runs at any worker, or its end is not reported.
        is_reached: Whether somebody is connected to the picker of any worker, by what says so of this one's.
    """

    def __init__(
        self,
        picker: Picker,
        settings: EndpointPicker,
        serve: Serve,
        places: Places,
        probed: Places,
        made: TlsFiles | None,
        others: Sequence[Rpc],
        is_ready: Callable[[], bool],
        is_busy: Callable[[], bool],
        is_reached: Callable[[Callable[[], bool]], bool],
    ) -> None:
        self._picker = picker
        self._leave_s = settings.leave_s
        self._until_s = 0.0
        self._is_busy = is_busy
        self._is_reached = is_reached
        self._made = made
        self._health, self._probed = Health(is_ready), Health(is_ready)
        self._server = serve((picker.rpc, *self._health.rpcs, *others), places, MAX_MESSAGE_BYTES)
        self._health_server: RpcServer | None = None
        if probed.others:
            self._health_server = serve(self._probed.rpcs, probed, MAX_HEALTH_BYTES)
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError if a place cannot be opened, or a file of TLS not read or made."""
        if self._made is not None:
            await asyncio.to_thread(make_self_signed, self._made)
        await self._server.listen()
        if self._health_server is not None:
            await self._health_server.listen()
        self._ticking = asyncio.create_task(self._tick(), name="picker tick")

    async def leave(self, grace_s: float) -> None:
        """Say that it leaves, take requests for a while still, then give what runs `grace_s` to end.

        Where streams are left early it can be reached until the gateway has told how their requests ended,
        for a gateway that has told nothing yet calls only then. Health on a port of its own is answered there
        until the stop.
        """
        self._review()
        await asyncio.sleep(self._leave_s)
        now_s = asyncio.get_running_loop().time
        self._until_s = now_s() + grace_s
        if not self._picker.leaves:
            await self.finish()
            return
        self._picker.close()
        # A poll, for what ends of requests wakes no task; where nobody is connected, nobody tells of them.
        while self._is_busy() and self._is_reached(self._server.is_reached):
            if now_s() >= self._until_s:
                return
            await asyncio.sleep(LOOK_S)

    async def finish(self) -> None:
        """Give what runs the rest of its time to end. Idempotent."""
        self._health.close()
        await self._server.drain(max(0.0, self._until_s - asyncio.get_running_loop().time()))

    def kept(self) -> list[Kept]:
        """The Unix sockets among its places."""
        servers = [server for server in (self._server, self._health_server) if server is not None]
        return [kept for server in servers for kept in kept_of(server)]

    async def stop(self) -> None:
        """End what still runs."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait([self._ticking])
        await self._server.close()
        if self._health_server is not None:
            self._probed.close()
            await self._health_server.close()
        if self._made is not None:
            remove(self._made)

    def _review(self) -> None:
        self._health.review()
        self._probed.review()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._picker.tick()
            self._review()


def picking_of(
    config: Config,
    index: int,
    workers: int,
    folder: Path,
    owner: str,
    gateway: Gateway,
    on_event: Callable[[RequestEvent], None],
    access_log: Rpc,
    is_ready: Callable[[], bool],
    is_busy: Callable[[], bool],
    is_reached: Callable[[Callable[[], bool]], bool],
    on_fault: Callable[[FaultReason, bool], None],
) -> Picking | None:
    """The endpoint picker of a worker, if it is wanted.

    Args:
        config: Of the start.
        index: Which worker.
        workers: How many there are; all listen, the first one at the Unix sockets as well.
        folder: Of the sockets.
        owner: Its name.
        gateway: Decides.
        on_event: Gets what happens to requests that were decided here.
        access_log: Served beside it where streams are left early: then it brings the ends.
        is_ready: See `Picking`.
        is_busy: See `Picking`.
        is_reached: See `Picking`.
        on_fault: See `rpc_server`.
    """
    settings = config.endpoint_picker
    if settings is None:
        return None

    def priority_of(objective: str) -> int | None:
        """As the configuration says, or else the pool's InferenceObjective of that name."""
        of_pool = gateway.router.settings.policies.priorities
        return settings.objectives.get(objective, of_pool.get(objective))

    dialect = PickerDialect(
        settings.fallbacks,
        SECRET_HEADERS,
        lambda: str(uuid.uuid4()),
        config.request.allow_headers,
        priority_of,
        owner if settings.leave_early else None,
        obeys_tests=settings.conformance,
    )
    picker = Picker(
        gateway.judge_for_picker,
        gateway,
        on_event,
        dialect,
        owner,
        config.request.max_body_bytes,
        settings.upload_timeout_s,
        lambda: gateway.router.settings.first_chunk,
        time.monotonic,
        leaves=settings.leave_early,
    )
    made = self_signed_files(folder, index)

    def serve(rpcs: Sequence[Rpc], places: Places, max_message_bytes: int) -> RpcServer:
        return rpc_server(config.server.transport, rpcs, places, max_message_bytes, on_fault)

    return Picking(
        picker,
        settings,
        serve,
        picker_places(settings, made, index, workers),
        health_places(settings, index, workers),
        made if settings.self_signed else None,
        (access_log,) if settings.leave_early else (),
        is_ready,
        is_busy,
        is_reached,
    )
