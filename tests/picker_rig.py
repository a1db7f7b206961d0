"""A foreign gateway by hand: the endpoint-picker service over a worker's real ledger, without a transport."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.picker.dialect import PickerDialect
from extproc.picker.service import Picker
from extproc.transport.seam import Message, Status, joined
from extproc.values.deciding import Deciding
from extproc.values.endings import RequestEvent
from extproc.values.placements import Decision
from tests.conftest import OWNER, Rig, build_rig, chat

Mode = processing_mode_pb2.ProcessingMode

UPLOAD_S = 30.0
MAX_BYTES = 10_000


class FakeCall:
    """Keeps what a service does to a call."""

    peer = "test"

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.ended: list[Status] = []

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """See `Call`."""
        self.sent.append(joined(message))

    def finish(self, last: Message | None = None) -> None:
        """See `Call`."""
        self.ended.append(Status.OK)

    def abort(self, status: Status, detail: str) -> None:
        """See `Call`."""
        self.ended.append(status)


class Gateway:
    """A foreign gateway before a rig.

    Attributes:
        rig: Decides.
        events: What the ledger was given.
        picker: The service.
    """

    def __init__(
        self, decide: Callable[..., Deciding[Decision]] | None = None, *, leaves: bool = False
    ) -> None:
        self.rig: Rig = build_rig()
        self.events: list[RequestEvent] = []
        if decide is not None:
            self.rig.gateway.decide = decide
        numbers = itertools.count()
        self.picker = Picker(
            self.rig.gateway.judge_for_picker,
            self.rig.gateway,
            self._noted,
            PickerDialect(1, (), lambda: f"r{next(numbers)}"),
            OWNER,
            MAX_BYTES,
            UPLOAD_S,
            lambda: True,
            self.rig.clock,
            leaves=leaves,
        )
        self.open()

    def open(self) -> None:
        """The next request's stream."""
        self.call = FakeCall()
        self.exchange = self.picker.open(self.call)

    def _noted(self, event: RequestEvent) -> None:
        self.events.append(event)
        self.rig.ends.take(event, self.rig.clock())

    def says(self, **message: Any) -> list[pb.ProcessingResponse]:
        """One message of the gateway; what was answered."""
        before = len(self.call.sent)
        self.exchange.on_message(pb.ProcessingRequest(**message).SerializeToString())
        return [pb.ProcessingResponse.FromString(raw) for raw in self.call.sent[before:]]

    def asks(self, *, stream: bool = True, mode: int | None = None) -> list[pb.ProcessingResponse]:
        """A whole chat request, of which the answer is in `mode`."""
        headers = pb.HttpHeaders()
        for name, value in ((":method", "POST"), (":path", "/v1/chat/completions")):
            headers.headers.headers.add(key=name, raw_value=value.encode())
        told = {}
        if mode is not None:
            told["protocol_config"] = pb.ProtocolConfiguration(
                request_body_mode=Mode.FULL_DUPLEX_STREAMED, response_body_mode=mode
            )
        assert self.says(request_headers=headers, **told) == []
        body = chat(stream=stream)
        return self.says(request_body=pb.HttpBody(body=body, end_of_stream=True))

    def answers(self, served: str | None = None) -> None:
        """The headers of an answer."""
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders())
        message.response_headers.headers.headers.add(key=":status", raw_value=b"200")
        if served is not None:
            message.metadata_context.filter_metadata["envoy.lb"].update(
                {"x-gateway-destination-endpoint-served": served}
            )
        self.exchange.on_message(message.SerializeToString())

    def charged(self) -> int:
        """Requests that are."""
        return self.rig.scheduling.load.in_flight

    def is_clean(self) -> bool:
        """Nothing is charged, held or open."""
        return not (self.charged() or len(self.picker) or len(self.rig.scheduling.running))
