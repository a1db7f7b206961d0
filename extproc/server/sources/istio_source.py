"""Endpoints from Istio: connection to istiod, clock and resolver around `discovery.istio.machine`.

Rules:
    1. All decisions are `IstioClient`'s. Here are its eyes and its hands.
    2. CA, certificate and token are read for each attempt: they rotate.
    3. What a large response takes is done in turns of `TURN_S`, between which requests go on: it is decoded,
       taken in parts, and what follows for the fleet is reported in steps, all in order.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, Final

from extproc.config.schema import Config
from extproc.config.sections.discovery import IstioDiscovery
from extproc.discovery.istio import wire
from extproc.discovery.istio.effects import (
    Connect,
    Effect,
    LookUp,
    Refused,
    Send,
    TooLarge,
    Update,
    slices_of,
)
from extproc.discovery.istio.machine import MAX_LIMIT_BYTES, IstioClient
from extproc.discovery.istio.messages import ASSIGNMENTS, MalformedError, Response, parting
from extproc.discovery.live import Report, SourceStatus
from extproc.discovery.resolve import ResolveError, addresses_of
from extproc.transport.dialling import (
    KEEPALIVE_S,
    KEEPALIVE_TIMEOUT_S,
    DialledCall,
    Ending,
    Place,
    certificate_pair,
    content,
)
from extproc.values.mesh_names import MeshName
from metadata_center.tokens import bearer

_log = logging.getLogger("tokenway.discovery")

_METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

_LOOK_UP_S: Final = 10.0
"""Bound on a look-up: twice the interval between two of a name."""

TURN_S: Final = 0.002
"""Of work in one turn of the event loop, and what its last step takes longer."""

MAX_WAITING_BYTES: Final = 2 * MAX_LIMIT_BYTES
"""Of responses that wait to be taken."""

_MAX_TOKEN_BYTES: Final = 65_536
_MAX_CA_BYTES: Final = 4 * 1024 * 1024


def node_of(settings: IstioDiscovery, host_name: str, index: int) -> bytes:
    """Who asks, as istiod wants to know it: a router, which sees all services that are exported to it.

    Args:
        settings: Namespace, labels and cluster.
        host_name: Shown by `istioctl proxy-status`.
        index: Which worker.
    """
    domain = f"{settings.namespace}.svc.cluster.local"
    name = re.sub(r"[^A-Za-z0-9-]", "-", host_name)[:63] or "tokenway"
    metadata: dict[str, object] = {
        "NAMESPACE": settings.namespace,
        "CLUSTER_ID": settings.cluster_id,
        "DISABLE_HBONE_SEND": "true",  # addresses of engines, not of tunnels to them
    }
    if settings.labels:
        metadata["LABELS"] = dict(settings.labels)
    return wire.node(f"router~127.0.0.1~{name}-{index}.{settings.namespace}~{domain}", "tokenway", metadata)


class IstioSource:
    """See `LiveSource`.

    Args:
        settings: Where istiod is.
        index: Which worker.
        report: Takes what istiod lists.
    """

    name: Final = "istio"

    def __init__(self, settings: IstioDiscovery, index: int, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._node = node_of(settings, socket.gethostname(), index)
        self._decoder = wire.ProtobufDecoder()
        self._machine = IstioClient(self._decoder, random.Random())
        self._call: DialledCall | None = None
        self._messages: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._parts: Iterator[Response | None] | None = None
        self._effects: deque[Iterator[Effect]] = deque()
        self._is_turn_due = False
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_first = asyncio.Event()
        self._is_running = False
        self._followed: frozenset[str] = frozenset()
        self._foreseen: frozenset[str] = frozenset()
        self._away: str | None = None
        """What is wrong with the files while it is away for that, empty for all other reasons."""

    def follow(self, config: Config) -> None:
        """See `LiveSource`."""
        self._followed, self._foreseen = config.clusters_named(), frozenset()
        self._carry_out(self._machine.follow(self._followed, time.monotonic()))

    def foresee(self, config: Config | None) -> None:
        """See `LiveSource`."""
        named = frozenset[str]() if config is None else config.clusters_named()
        self._foreseen = frozenset(name for name in named - self._followed if MeshName.of(name) is not None)
        self._carry_out(self._machine.follow(self._followed | self._foreseen, time.monotonic()))

    def is_heard(self) -> bool:
        """See `LiveSource`."""
        is_behind = bool(self._effects or self._messages) or not self._machine.is_in_sync
        return not self._foreseen or not is_behind

    async def start(self) -> None:
        """See `LiveSource`."""
        self._is_running = True
        self._carry_out(self._machine.begin(time.monotonic()))

    async def first_state(self) -> None:
        """See `LiveSource`."""
        await self._has_first.wait()

    async def stop(self) -> None:
        """See `LiveSource`."""
        self._is_running = False
        self._drop_messages()
        self._effects.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            await self._call.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> SourceStatus:
        """See `LiveSource`."""
        machine = self._machine
        return SourceStatus(
            machine.is_connected, machine.age_s(time.monotonic()), machine.updates, machine.rejects
        )

    # Work, in turns.

    def _carry_out(self, effects: Sequence[Effect]) -> None:
        """Carry these out behind those that were said before, as many as a turn has time for."""
        if effects:
            self._effects.append(_steps(effects))
        if not self._is_turn_due:
            self._turn()

    def _turn(self) -> None:
        self._is_turn_due, is_left = True, True
        until_s = time.perf_counter() + TURN_S
        try:
            while is_left and time.perf_counter() < until_s:
                is_left = self._step()
        finally:  # a bug of ours in one step must not end all work
            self._is_turn_due = is_left
            if is_left:
                asyncio.get_running_loop().call_soon(self._turn)
        if is_left:
            return
        if self._machine.has_first_state:
            self._has_first.set()
        self._note_presence()
        self._wake()

    def _step(self) -> bool:
        """A piece of the oldest work; False if there is none."""
        if self._effects:
            effect = next(self._effects[0], None)
            if effect is None:
                self._effects.popleft()
            else:
                self._do(effect)
        elif self._messages:
            self._take_some()
        else:
            return False
        return True

    def _take_some(self) -> None:
        """Read a piece of the oldest message, or take a part of it."""
        number, message = self._messages[0]
        if self._parts is None:
            self._parts = self._read(message)
        part = None
        try:
            part = next(self._parts)
        except StopIteration:
            self._next_message()
        except MalformedError as error:
            self._next_message()
            self._ended(number, Ending(str(error)))
        if part is not None:
            self._effects.append(_steps(self._machine.received(number, part, time.monotonic())))

    def _read(self, message: bytes) -> Iterator[Response | None]:
        """A message in parts, with None wherever there was work for a while.

        Raises:
            MalformedError: It is no response; no part came before that.
        """
        reading = wire.decoding(message)
        while True:
            try:
                next(reading)
            except StopIteration as end:
                response: Response = end.value
                break
            yield None
        for part in parting(response):
            if part is not None and part.type_url == ASSIGNMENTS:
                yield from self._decoder.preparing(one.body for one in part.resources)
            yield part

    def _next_message(self) -> None:
        _, message = self._messages.popleft()
        self._waiting_bytes -= len(message)
        self._parts = None

    def _drop_messages(self) -> None:
        self._messages.clear()
        self._waiting_bytes, self._parts = 0, None

    # What the machine says.

    def _do(self, effect: Effect) -> None:
        match effect:
            case Connect():
                self._connect(effect)
            case Send():
                if self._call is not None:
                    self._call.send(wire.encode(effect.request, self._node))
            case Update():
                self._report(effect.clusters)
            case LookUp():
                self._begin(self._look_up(effect.name))
            case Refused():
                extra = {"source": self.name, "type_url": effect.type_url, "problem": effect.detail}
                _log.error("what istiod sent cannot be used and changes nothing", extra=extra)
            case TooLarge():
                size = {"source": self.name, "limit_bytes": effect.limit_bytes}
                if effect.is_final:
                    _log.error("what istiod sends is too large", extra=size)
                else:
                    _log.info("istiod sends more than expected: asking again for more", extra=size)

    def _connect(self, effect: Connect) -> None:
        former, number = self._call, effect.number
        if former is not None:
            self._begin(former.close())
        self._number, self._call = number, None
        self._drop_messages()  # of the stream before
        try:
            place = self._place()
        except OSError as error:
            detail = str(error) if error.filename is None else f"{error.filename}: {error.strerror or error}"
            asyncio.get_running_loop().call_soon(self._ended, number, Ending(detail), detail)
            return
        self._call = DialledCall(
            place,
            _METHOD,
            effect.limit_bytes,
            lambda message: self._received(number, message),
            lambda ending: self._ended(number, ending),
        )
        self._carry_out(self._machine.opened(number))

    def _place(self) -> Place:
        """Where istiod is, with the files as they are now.

        Raises:
            OSError: One cannot be read.
        """
        tls = self._settings.tls
        if tls is None:
            return Place(self._settings.address)
        headers: tuple[tuple[str, str], ...] = ()
        if tls.token_file is not None:
            try:
                token = bearer(content(tls.token_file, _MAX_TOKEN_BYTES))
            except ValueError as error:
                raise OSError(errno.EINVAL, str(error), tls.token_file) from None
            headers = (("authorization", f"Bearer {token}"),)
        ca_pem = content(tls.ca_file, _MAX_CA_BYTES)
        pair = None
        if tls.cert_file is not None and tls.key_file is not None:
            try:
                pair = certificate_pair(tls.cert_file, tls.key_file)
            except ssl.SSLError as error:  # its words name no file
                problem = f"no certificate and its key, without a passphrase: {error.reason or error}"
                raise OSError(error.errno, problem, f"{tls.cert_file}, {tls.key_file}") from None
        return Place(self._settings.address, ca_pem, pair, tls.server_name, headers)

    def _received(self, number: int, message: bytes) -> None:
        if number != self._number or not self._is_running:
            return
        self._messages.append((number, message))
        self._waiting_bytes += len(message)
        if self._waiting_bytes > MAX_WAITING_BYTES:
            self._ended(number, Ending("istiod sends faster than it can be taken"))
        self._carry_out(())

    def _ended(self, number: int, ending: Ending, problem: str = "") -> None:
        if not self._is_running or number != self._number:
            return
        self._drop_messages()
        silent_s = KEEPALIVE_S + KEEPALIVE_TIMEOUT_S if ending.is_silent else 0.0
        effects = self._machine.lost(
            number, time.monotonic(), is_too_large=ending.is_too_large, silent_s=silent_s
        )
        if self._away != problem and not ending.is_too_large:
            self._away = problem
            extra = {"source": self.name, "address": self._settings.address, "cause": ending.detail}
            _log.warning("a source of endpoints is away: what it listed last stays", extra=extra)
        self._carry_out(effects)

    def _note_presence(self) -> None:
        if self._machine.is_connected and self._away is not None:
            self._away = None
            extra = {"source": self.name, "address": self._settings.address}
            _log.info("a source of endpoints is back", extra=extra)

    async def _look_up(self, name: str) -> None:
        addresses: Sequence[str] = ()
        try:
            addresses = await addresses_of(name, _LOOK_UP_S)
        except ResolveError as error:
            _log.debug("host name has no address", extra={"host": name, "cause": str(error)})
        self._carry_out(self._machine.answered(name, addresses, time.monotonic()))

    # The clock.

    def _wake(self) -> None:
        """Be called when time alone changes something."""
        if self._timer is not None:
            self._timer.cancel()
        next_s = self._machine.next_s()
        if next_s is not None and self._is_running:
            delay_s = max(0.0, next_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._advance)

    def _advance(self) -> None:
        self._carry_out(self._machine.advance(time.monotonic()))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _steps(effects: Sequence[Effect]) -> Iterator[Effect]:
    for effect in effects:
        if isinstance(effect, Update):
            yield from slices_of(effect)
        else:
            yield effect
