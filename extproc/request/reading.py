"""A body read where it is not needed decoded: what the decision needs of it, and the body to send instead.

Rules:
    1. Everything that takes time in proportion to a body happens in here, so that it can happen elsewhere.
    2. What comes of it is small: bytes, numbers and names, whatever the body is made of.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import orjson
from xxhash import xxh3_64_intdigest

from extproc.request.exact import written_anew
from extproc.request.parse import is_form, parse
from extproc.request.sanitize import encode, force_usage, sanitize
from extproc.request.structure import check_structure
from extproc.values.requests import ANY_MODEL, InferenceRequest

Pieces = tuple[bytes | bytearray | memoryview, ...]
"""Of a body, to be joined where it is sent."""

_KEPT = ("previous_response_id", "conversation")
"""Fields that a decision needs: what is built on."""

_MOST_KEPT_BYTES = 4096
"""Ids are bounded to 512 characters where they are read."""

_MODEL_MARK = b"\xff"  # in no JSON


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """How a body is to be read.

    Attributes:
        path: The request's `:path`.
        allowed: Steering fields to leave alone.
        usage_injection: Ask the engine for usage on every stream.
        rewritten: Model names that some rule replaces.
        max_prompt_bytes: What is hashed of a prompt; the rest is counted.
        is_renamed: The model has another name in the body to send, whatever it is called here.
    """

    path: str
    allowed: frozenset[str]
    usage_injection: bool
    rewritten: Collection[str]
    max_prompt_bytes: int
    is_renamed: bool = False


@dataclass(frozen=True, slots=True)
class BodyRead:
    """A body that was read.

    Attributes:
        request: Understood, with those fields of its body alone that a decision needs.
        is_changed: The client's body may not be sent as it came.
        around_model: The body to send, up to the model's name and from behind it; None if it goes as it came,
            whatever the model is called.
        fingerprint: xxh3_64 of the body as it came.
        is_form: It is `multipart/form-data`, not JSON.
    """

    request: InferenceRequest
    is_changed: bool
    around_model: tuple[bytes | memoryview, bytes | memoryview] | None
    fingerprint: int
    is_form: bool = False

    def new_body(self, model: str | None) -> Pieces | None:
        """The body to send instead of the client's; None if that one may go as it came.

        Args:
            model: What the engine calls the model; None if it is what the client said.
        """
        if model is None and not self.is_changed:
            return None
        assert self.around_model is not None, "every rewritten name was in the order"
        before, after = self.around_model
        name = model or self.request.model
        return before, name.encode() if self.is_form else orjson.dumps(name), after


def read_body(order: ReadOrder, body: bytes) -> BodyRead:
    """Read a body that may be large.

    Args:
        order: How.
        body: As it came.

    Raises:
        RouterError: As `parse`, and BODY_TOO_LARGE for one of too many pieces.
    """
    if is_form(order.path):
        return _read_form(order, body)
    check_structure(body)
    request = parse(order.path, body)
    fields = request.body
    operation = request.operation

    def edit(of: dict[str, Any]) -> bool:
        changed = bool(sanitize(of, order.allowed))
        if order.usage_injection:
            changed |= force_usage(of, operation)
        return changed

    def edit_and_mark(of: dict[str, Any]) -> None:
        edit(of)
        of["model"] = orjson.Fragment(_MODEL_MARK)

    is_changed = edit(fields)
    around_model = None
    if is_changed or _is_renamed(order, request):
        marked = {**fields, "model": orjson.Fragment(_MODEL_MARK)}
        encoded = written_anew(marked, body, edit_and_mark)
        before, _, after = encoded.partition(_MODEL_MARK)
        around_model = (before, after)
    cut = max(0, len(request.prompt) - order.max_prompt_bytes)
    request = replace(
        request,
        body={name: fields[name] for name in _KEPT if _is_small(fields.get(name))},
        has_body=False,
        prompt=request.prompt[: order.max_prompt_bytes],
        more_bytes=request.more_bytes + cut,
        widths=tuple(width for width in request.widths if width[0] < order.max_prompt_bytes),
    )
    return BodyRead(request, is_changed, around_model, xxh3_64_intdigest(body))


def _read_form(order: ReadOrder, body: bytes) -> BodyRead:
    """The same of a form, of which a decision needs nothing but what `parse` says."""
    request = parse(order.path, body)
    form = request.form
    assert form is not None, "a form was parsed"
    is_changed = form.is_changed(order.allowed)
    around_model = None
    if is_changed or _is_renamed(order, request):
        around_model = form.around_model(order.allowed)
    return BodyRead(
        replace(request, form=None), is_changed, around_model, xxh3_64_intdigest(body), is_form=True
    )


def _is_renamed(order: ReadOrder, request: InferenceRequest) -> bool:
    return order.is_renamed or request.model in order.rewritten or ANY_MODEL in order.rewritten


def _is_small(value: object) -> bool:
    """True for what may be kept; an absent field is not."""
    return value is not None and len(encode(value)) <= _MOST_KEPT_BYTES
