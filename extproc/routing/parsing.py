"""A parsed request: what it alone says, before any endpoint's state is looked at.

Rules:
    1. Nothing here depends on load, caches or health, so it holds however long the request then waits.
    2. What cannot be parsed raises `RouterError` and leaves no trace.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from typing import Any

from xxhash import xxh3_64_intdigest

from extproc.errors import Reason, RouterError
from extproc.predicting.predictor import Predictor
from extproc.request.blocks import MAX_BLOCKS, block_hashes
from extproc.request.exact import written_anew
from extproc.request.parse import parse
from extproc.request.reading import BodyRead, Pieces, ReadOrder
from extproc.request.responses import Follows, follows
from extproc.request.rules import Route
from extproc.request.sanitize import force_usage, rewrite_model, sanitize
from extproc.routing.settings import RouterSettings
from extproc.routing.table import RoutingTable
from extproc.values.choices import Rng
from extproc.values.exchange import Body, RequestHeaders
from extproc.values.headers import REQUEST_ID_HEADER
from extproc.values.placements import Renamed
from extproc.values.requests import CONTINUING, InferenceRequest
from metadata_center.roots import root
from metadata_center.types import RequestId, value


@value
class ParsedRequest:
    """A request that is parsed and not yet scheduled.

    Attributes:
        request_id: Whose.
        headers: As they came.
        request: Its body.
        route: Where it may go.
        new_body: The body to send instead of the client's, in pieces; or None.
        blocks: Hashes of its prompt's blocks.
        prompt_tokens: Exact or estimated.
        received_s: Monotonic time when the body was there.
        follows: The stored response and the conversation that it builds on, or None.
        fingerprint: xxh3_64 of the body as it came: what shows that a client sends the same again.
        renamed: What the engine calls the model, if not what the client does.
    """

    request_id: RequestId
    headers: RequestHeaders
    request: InferenceRequest
    route: Route
    new_body: Pieces | None
    blocks: array[int]
    prompt_tokens: int
    received_s: float
    follows: Follows | None = None
    fingerprint: int = 0
    renamed: Renamed | None = None


def parse_request(
    headers: RequestHeaders,
    body: Body,
    table: RoutingTable,
    settings: RouterSettings,
    predictor: Predictor,
    rng: Rng,
    now_s: float,
) -> ParsedRequest:
    """What a request says.

    Args:
        headers: Its headers.
        body: All of its body, neither too large nor of too many pieces.
        table: Which models there are.
        settings: What is allowed.
        predictor: Estimates tokens by bytes.
        rng: Draws among equally specific rules, and among a rewrite's models.
        now_s: Monotonic time.

    Raises:
        RouterError: It cannot be served.
    """
    said = parse(headers.path, body)
    asked = _asked(said, headers, settings, rng)
    request = said if asked is None else replace(said, model=asked)
    route = table.rules.match(request.model, headers.headers, rng)
    engine_model = route.upstream_model or asked
    new_body = _new_body(request, body, engine_model, table, settings)
    fingerprint = xxh3_64_intdigest(body)
    renamed = _renamed(said, engine_model)
    return _parsed(headers, request, route, new_body, renamed, settings, predictor, now_s, fingerprint)


def parse_read(
    headers: RequestHeaders,
    read: BodyRead,
    table: RoutingTable,
    settings: RouterSettings,
    predictor: Predictor,
    rng: Rng,
    now_s: float,
) -> ParsedRequest:
    """What a request says whose body was read elsewhere, by `order_of` the same table; see `parse_request`.

    Raises:
        RouterError: It cannot be served.
    """
    asked = _asked(read.request, headers, settings, rng)
    request = read.request if asked is None else replace(read.request, model=asked)
    route = table.rules.match(request.model, headers.headers, rng)
    engine_model = route.upstream_model or asked
    new_body = read.new_body(engine_model)
    renamed = _renamed(read.request, engine_model)
    return _parsed(headers, request, route, new_body, renamed, settings, predictor, now_s, read.fingerprint)


def _asked(said: InferenceRequest, headers: RequestHeaders, settings: RouterSettings, rng: Rng) -> str | None:
    """The model to ask for in place of the body's: as a proxy says, or else a rewrite of the pool."""
    if headers.model is not None:
        return headers.model
    return settings.policies.rewritten(said.model, rng) if settings.policies.rewrites else None


def _renamed(said: InferenceRequest, engine_model: str | None) -> Renamed | None:
    if engine_model is None or engine_model == said.model:
        return None
    return Renamed(said.model, engine_model)


def order_of(headers: RequestHeaders, table: RoutingTable, settings: RouterSettings) -> ReadOrder:
    """How a body is to be read elsewhere."""
    return ReadOrder(
        headers.path,
        table.allowed_fields,
        settings.usage_injection,
        table.rules.rewritten,
        MAX_BLOCKS * settings.block_bytes,
        headers.model is not None or bool(settings.policies.rewrites),
    )


def check_size(body: Body, settings: RouterSettings) -> None:
    """Refuse a body that is too large.

    Raises:
        RouterError: BODY_TOO_LARGE.
    """
    if len(body) > settings.max_body_bytes:
        raise RouterError(
            Reason.BODY_TOO_LARGE,
            f"The request body is larger than {settings.max_body_bytes} bytes.",
            param="body",
        )


def _parsed(
    headers: RequestHeaders,
    request: InferenceRequest,
    route: Route,
    new_body: Pieces | None,
    renamed: Renamed | None,
    settings: RouterSettings,
    predictor: Predictor,
    now_s: float,
    fingerprint: int,
) -> ParsedRequest:
    blocks = block_hashes(
        request.prompt,
        root(route.model, route.lora, request.cache_salt),
        settings.block_bytes,
        widths=request.widths,
    )
    prompt_tokens = request.prompt_tokens
    if prompt_tokens is None:
        prompt_tokens = predictor.prompt_tokens(route.model, request.prompt_bytes)
    request_id = RequestId(headers.headers.get(REQUEST_ID_HEADER, ""))
    builds_on = follows(request.body) if request.operation in CONTINUING else None
    return ParsedRequest(
        request_id,
        headers,
        request,
        route,
        new_body,
        blocks,
        prompt_tokens,
        now_s,
        builds_on,
        fingerprint,
        renamed,
    )


def _new_body(
    request: InferenceRequest,
    body: Body,
    engine_model: str | None,
    table: RoutingTable,
    settings: RouterSettings,
) -> Pieces | None:
    """The body to send instead of the client's, or None if that one may go as it came."""
    if request.form is not None:
        rewritten = request.form.rewritten(engine_model, table.allowed_fields)
        return None if rewritten is None else (rewritten,)

    def edit(fields: dict[str, Any]) -> bool:
        changed = bool(sanitize(fields, table.allowed_fields))
        if engine_model is not None:
            changed |= rewrite_model(fields, engine_model)
        if settings.usage_injection:
            changed |= force_usage(fields, request.operation)
        return changed

    return (written_anew(request.body, body, edit),) if edit(request.body) else None
