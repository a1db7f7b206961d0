"""The endpoint picker of a worker: its gRPC server, its clock, and how it leaves."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

from extproc.config.rule_headers import SECRET_HEADERS
from extproc.config.schema import Config
from extproc.config.sections.listening import EndpointPicker
from extproc.picker.dialect import PickerDialect
from extproc.picker.health import Health
from extproc.picker.service import Picker
from extproc.routing.gateway import Gateway
from extproc.server.rpc_places import picker_places
from extproc.server.rpc_server import rpc_server
from extproc.transport.http2.faults import FaultReason
from extproc.values.endings import RequestEvent

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
    """

    def __init__(
        self,
        picker: Picker,
        settings: EndpointPicker,
        config: Config,
        is_ready: Callable[[], bool],
        on_fault: Callable[[FaultReason, bool], None],
    ) -> None:
        self._picker = picker
        self._health = Health(is_ready)
        self._leave_s = settings.leave_s
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

    async def drain(self, grace_s: float) -> None:
        """Say that it leaves, take requests for a while still, then give what runs `grace_s` to end."""
        self._health.review()
        await asyncio.sleep(self._leave_s)
        self._health.close()
        await self._server.drain(grace_s)

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
            self._health.review()


def picking_of(
    config: Config,
    index: int,
    owner: str,
    gateway: Gateway,
    on_event: Callable[[RequestEvent], None],
    is_ready: Callable[[], bool],
    on_fault: Callable[[FaultReason, bool], None],
) -> Picking | None:
    """The endpoint picker of worker `index`, if it is wanted: the first one has all further addresses.

    Args:
        config: Of the start.
        index: Which worker.
        owner: Its name.
        gateway: Decides.
        on_event: Gets what happens to requests that were decided here.
        is_ready: See `Picking`.
        on_fault: Likewise.
    """
    settings = config.endpoint_picker
    if settings is None or index != 0:
        return None
    picker = Picker(
        gateway.judge_for_picker,
        gateway,
        on_event,
        PickerDialect(
            settings.fallbacks, SECRET_HEADERS, lambda: str(uuid.uuid4()), config.request.allow_headers
        ),
        owner,
        config.request.max_body_bytes,
        settings.upload_timeout_s,
        lambda: gateway.router.settings.first_chunk,
        time.monotonic,
    )
    return Picking(picker, settings, config, is_ready, on_fault)
