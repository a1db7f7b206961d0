"""How a decision is put to one kind of Envoy set-up, and what its messages say.

Rules:
    1. A dialect owns which bodies Envoy sends and how, the headers and metadata of an answer, and how these
       name cluster and endpoints. What decides knows none of it.
    2. It is pure: messages in, messages out. Equal decisions give equal answers.
"""

from __future__ import annotations

from typing import Any, Protocol

from extproc.errors import RouterError
from extproc.protocol.machine import MessageKind
from extproc.transport.seam import Message, Received
from extproc.values.exchange import PassTo, RequestHeaders
from extproc.values.placements import Decision


class Dialect(Protocol):
    """What the service asks of a dialect. Every answer is a serialised `ProcessingResponse`."""

    def parse(self, raw: Received) -> Any:
        """What came: a `ProcessingRequest`, or what looks like one."""

    def request_headers(self, message: Any) -> RequestHeaders:
        """The request line and headers of a message that has them."""

    def await_body(self, *, first_chunk: bool) -> bytes:
        """To the headers: send the body and, if `first_chunk`, the beginning of the answer as well."""

    def decision(self, decision: Decision, *, to_trailers: bool) -> Message:
        """To the body: the request goes as was decided; `to_trailers` if those came instead of a body.

        A large new body stays in pieces.
        """

    def pass_to(self, passes: PassTo) -> bytes:
        """To the headers: the request goes past us."""

    def let_pass(self, kind: MessageKind) -> bytes:
        """To a message of that kind: nothing is changed."""

    def patience(self, wait_s: float) -> bytes:
        """To the message that is being answered: the answer takes so many seconds more."""

    def immediate(self, status: int, body: bytes, details: str, error: RouterError | None) -> bytes:
        """To any message: a whole response of our own; `error` if it is a refusal."""
