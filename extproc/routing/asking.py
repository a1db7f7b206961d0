"""A request understood: what it alone says, before any endpoint's state is looked at.

Rules:
    1. Nothing here depends on load, caches or health, so it holds however long the request then waits.
    2. What cannot be understood raises `RouterError` and leaves no trace.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from extproc.errors import Reason, RouterError
from extproc.predicting.predictor import Predictor
from extproc.protocol.machine import RequestHeaders
from extproc.protocol.wire import REQUEST_ID_HEADER
from extproc.request.blocks import block_hashes, root
from extproc.request.parse import parse
from extproc.request.rules import Route
from extproc.request.sanitize import encode, force_usage, rewrite_model, sanitize
from extproc.routing.settings import RouterSettings
from extproc.routing.table import RoutingTable
from extproc.types import InferenceRequest, Rng
from metadata_center.types import RequestId, value


@value
class Asked:
    """A request understood and not yet decided.

    Attributes:
        request_id: Whose.
        headers: As they came.
        request: Its body.
        route: Where it may go.
        new_body: The body to send instead of the client's, or None.
        blocks: Hashes of its prompt's blocks.
        prompt_tokens: Exact or estimated.
        received_s: Monotonic time when the body was there.
        fingerprint: xxh3_64 of the body as it came: what tells that a client sends the same again.
    """

    request_id: RequestId
    headers: RequestHeaders
    request: InferenceRequest
    route: Route
    new_body: bytes | None
    blocks: list[int]
    prompt_tokens: int
    received_s: float
    fingerprint: int = 0


def understand(
    headers: RequestHeaders,
    body: bytes,
    table: RoutingTable,
    settings: RouterSettings,
    predictor: Predictor,
    rng: Rng,
    now_s: float,
) -> Asked:
    """What a request says.

    Args:
        headers: Its headers.
        body: All of its body.
        table: Which models there are.
        settings: What is allowed.
        predictor: Estimates tokens by bytes.
        rng: Draws among equally specific rules.
        now_s: Monotonic time.

    Raises:
        RouterError: It cannot be served.
    """
    if len(body) > settings.max_body_bytes:
        raise RouterError(
            Reason.BODY_TOO_LARGE,
            f"The request body is larger than {settings.max_body_bytes} bytes.",
            param="body",
        )
    request = parse(headers.path, body)
    route = table.rules.match(request.model, headers.headers, rng)
    new_body = _new_body(request, route, table, settings)
    blocks = block_hashes(
        request.prompt,
        root(route.model, route.lora, request.cache_salt),
        settings.block_bytes,
    )
    prompt_tokens = request.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = predictor.prompt_tokens(route.model, len(request.prompt))
    request_id = RequestId(headers.headers.get(REQUEST_ID_HEADER, ""))
    return Asked(
        request_id,
        headers,
        request,
        route,
        new_body,
        blocks,
        prompt_tokens,
        now_s,
        xxh3_64_intdigest(body),
    )


def _new_body(
    request: InferenceRequest, route: Route, table: RoutingTable, settings: RouterSettings
) -> bytes | None:
    """The body to send instead of the client's, or None if that one may go as it came."""
    body = request.body
    changed = bool(sanitize(body, table.allowed_fields))
    if route.upstream_model is not None:
        changed |= rewrite_model(body, route.upstream_model)
    if settings.usage_injection:
        changed |= force_usage(body, request.operation)
    return encode(body) if changed else None
