"""Where a request goes, as a value: what is charged for it, and what Envoy is to get.

Rules:
    1. Values name endpoints, clusters and times. How they are put to Envoy is a dialect's affair
       (`extproc.protocol.dialect`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from extproc.values.requests import Operation
from metadata_center.types import Charge, EndpointKey, RequestId, value


@value
class Leg:
    """One engine's part in a request.

    Attributes:
        charge: What it costs which endpoint.
        prefill_due_s: When its prefill is taken to be over; None waits for its first token.
    """

    charge: Charge
    prefill_due_s: float | None


@value
class Placement:
    """Which engines serve a request.

    Attributes:
        legs: At least one, as many as each charge says; Envoy sends the request to the first.
    """

    legs: tuple[Leg, ...]

    @property
    def endpoint(self) -> EndpointKey:
        """The endpoint that Envoy sends the request to."""
        return self.legs[0].charge.endpoint


@dataclass(slots=True)
class Plan:
    """How Envoy is to try endpoints; one object for all requests that are to be tried alike.

    Attributes:
        cluster: Envoy cluster, the same for each attempt.
        endpoints: `ip:port`, in the order to try; one may be named twice. Empty leaves the choice to Envoy.
        retries: How often it may try again at most; None leaves it to its configuration.
        timeout_s: Until the whole answer is there; None leaves it to Envoy's configuration.
        first_byte_timeout_s: Until the first byte of each attempt's answer, instead.
        pinned: The first endpoint alone has what is asked for: another one is asked only where it is gone.
        charged: The worker that decided charged it, and hears what becomes of it.
        rendered: What a dialect made of it, by the field of the answer; kept as long as the plan.
    """

    cluster: str
    endpoints: tuple[str, ...] = ()
    retries: int | None = None
    timeout_s: float | None = None
    first_byte_timeout_s: float | None = None
    pinned: bool = False
    charged: bool = True
    rendered: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)


@value
class Renamed:
    """A model that has another name at the engine.

    Attributes:
        client: As the client's body says it.
        engine: As the engine's body says it.
    """

    client: str
    engine: str


@value
class Decision:
    """What was decided about a request that goes to an engine.

    Attributes:
        request_id: Whose.
        operation: The API that was asked.
        stream: The client asked for a stream.
        plan: Where it goes.
        new_body: In place of the client's, in pieces; None sends the client's own.
        drops_encoding: Its header `content-encoding` is true no more and goes.
        shows_id: The client gets the id of the decision.
        renamed: The engine is asked for the model by another name than the client's; None if by the same.
        new_path: In place of the client's, in the engine's own spelling; None sends the client's own.
    """

    request_id: RequestId
    operation: Operation
    stream: bool
    plan: Plan
    new_body: tuple[bytes | bytearray | memoryview, ...] | None = None
    drops_encoding: bool = False
    shows_id: bool = False
    renamed: Renamed | None = None
    new_path: str | None = None
