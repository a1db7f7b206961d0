"""The endpoint picker of a worker: its gRPC server, its clock, and how it leaves."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable

from extproc.config.rule_headers import SECRET_HEADERS
from extproc.config.schema import Config
from extproc.config.sections.listening import EndpointPicker
from extproc.picker.dialect import PickerDialect
from extproc.picker.health import Health
from extproc.picker.service import Picker
from extproc.protocol.servicer import Decider
from extproc.server.rpc_server import picker_places, rpc_server
from extproc.transport.http2.faults import FaultReason
from extproc.values.endings import RequestEvent
from extproc.values.exchange import LineVerdict, RequestHeaders

TICK_S = 1.0
"""Between looks at streams that wait for a body or run."""

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Of one message: Envoy cuts bodies into chunks of at most 1 MiB, and headers are less."""


class Picking:
    """Serves the endpoint-picker protocol.

    Args:
        picker: The protocol.
        settings: Where, and how it leaves.
        config: Of the start.
        is_ready: True while the worker takes requests.
        on_fault: See `rpc_server`.
        drain_s: How long streams may take to end once none is taken any more; as of now.
    """

    def __init__(
        self,
        picker: Picker,
        settings: EndpointPicker,
        config: Config,
        is_ready: Callable[[], bool],
        on_fault: Callable[[FaultReason, bool], None],
        drain_s: Callable[[], float],
    ) -> None:
        self._picker = picker
        self._health = Health(is_ready)
        self._leave_s = settings.leave_s
        self._drain_s = drain_s
        self._server = rpc_server(
            config.server.transport,
            (picker.rpc, *self._health.rpcs),
            picker_places(settings),
            MAX_MESSAGE_BYTES,
            on_fault,
        )
        self._ticking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError if a place cannot be opened, or a file of TLS not read."""
        await self._server.listen()
        self._ticking = asyncio.create_task(self._tick(), name="picker tick")

    async def drain(self) -> None:
        """Say that it leaves, take requests for a while still, then let what runs end."""
        self._health.tell()
        await asyncio.sleep(self._leave_s)
        self._health.close()
        await self._server.drain(self._drain_s())

    async def stop(self) -> None:
        """End what still runs."""
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.wait([self._ticking])
        await self._server.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._picker.tick()
            self._health.tell()


def make_picker(
    settings: EndpointPicker,
    config: Config,
    owner: str,
    judge: Callable[[RequestHeaders], LineVerdict],
    decider: Decider,
    told: Callable[[RequestEvent], None],
    first_chunk: Callable[[], bool],
    clock: Callable[[], float],
) -> Picker:
    """The protocol as configured; arguments as of `Picker`."""
    dialect = PickerDialect(settings.fallbacks, SECRET_HEADERS, lambda: str(uuid.uuid4()))
    max_body_bytes, upload_s = config.request.max_body_bytes, settings.upload_timeout_s
    return Picker(judge, decider, told, dialect, owner, max_body_bytes, upload_s, first_chunk, clock)


def together(*steps: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """All of them at a time."""

    async def run() -> None:
        await asyncio.gather(*(step() for step in steps))

    return run
