"""Fields of a call's body and query: each is checked where it is read, and refused by its name."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs

import orjson

from metadata_center.addresses import Address, ip_or_none
from metadata_center.service.calls import Code, RefusedError, ServiceRequest, invalid

MAX_HASHES: Final = 32_768
"""Prompt pieces of one call: 16 MiB of prompt text in AIGW's steps of 512 bytes."""

MAX_NAME_CHARS: Final = 256
"""Of a cluster, as AIGW's own configuration has it, and of a request id."""

MAX_INT32: Final = 2**31 - 1
"""AIGW's client reads `queued_req_num` and `prompt_length` as int32 and fails the whole answer on more."""

MAX_HASH: Final = 2**64 - 1

_MAX_ADDRESS_CHARS: Final = 64  # a bracketed IPv6 address with a port has 47
_MAX_QUERY_FIELDS: Final = 16  # one is asked for


class Body:
    """The JSON object in a request's body; each accessor raises `RefusedError` if its field will not do."""

    def __init__(self, request: ServiceRequest) -> None:
        try:
            fields = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise RefusedError(Code.INVALID_INPUT, error.msg, detail="invalid JSON format") from error
        if not isinstance(fields, dict):
            raise invalid("the body should be an object")
        self._fields: dict[str, Any] = fields

    def name(self, field: str) -> str:
        """A string of 1..`MAX_NAME_CHARS` characters."""
        return _checked_name(field, self._fields.get(field))

    def count(self, field: str) -> int:
        """An integer 0..`MAX_INT32`; 0 if absent."""
        found = _integer(self._fields.get(field, 0))
        if found is None or not 0 <= found <= MAX_INT32:
            raise invalid(f"field {field} should be an integer, 0..{MAX_INT32}")
        return found

    def known_count(self, field: str) -> int | None:
        """An integer 0..`MAX_INT32`; None if absent."""
        return self.count(field) if field in self._fields else None

    def hashes(self, field: str) -> list[int]:
        """A list of up to `MAX_HASHES` unsigned 64-bit integers."""
        found = self._fields.get(field)
        if found is None:
            raise invalid(f"field {field} is required")
        if not isinstance(found, list) or len(found) > MAX_HASHES:
            raise invalid(f"field {field} should be a list of at most {MAX_HASHES} integers")
        hashes: list[int] = found
        if not set(map(type, found)) <= {int}:
            hashes = [number for number in map(_integer, found) if number is not None]
        in_range = not hashes or 0 <= min(hashes) <= max(hashes) <= MAX_HASH
        if len(hashes) != len(found) or not in_range:
            raise invalid(f"field {field} should hold integers, 0..{MAX_HASH}")
        return hashes

    def address(self, field: str) -> str:
        """`ip` or `ip:port`, an IPv6 address with a port in brackets; canonical."""
        found = self._fields.get(field)
        if found is None or found == "":
            raise invalid(f"field {field} is required")
        try:
            return canonical_address(found)
        except ValueError:
            reason = f"field {field} should be an IPv4 or IPv6 address, with or without a port"
            raise invalid(reason) from None


def _integer(found: object) -> int | None:
    """An integer as JSON Schema has it: 12.0 is one, true is none. Beyond 64 bits decoding makes floats."""
    if type(found) is float and found.is_integer():
        return int(found)
    return found if type(found) is int else None


def canonical_address(text: object) -> str:
    """One spelling per engine: IPv6 as in RFC 5952, ports without leading zeros.

    Raises:
        ValueError: Not `ip`, `ipv4:port` or `[ipv6]:port`; zones are refused, they mean nothing to others.
    """
    if not isinstance(text, str) or len(text) > _MAX_ADDRESS_CHARS or "%" in text:
        raise ValueError("not an address")
    ip = ip_or_none(text)
    if ip is not None:
        return ip
    address = Address.parse(text, lowest_port=1)
    if ip_or_none(address.host) is None:
        raise ValueError("not an IP address")
    return str(address)


def query_name(query: str, field: str) -> str:
    """A field of a query, a string of 1..`MAX_NAME_CHARS` characters.

    Raises:
        RefusedError: It will not do.
    """
    try:
        values = parse_qs(query, errors="strict", max_num_fields=_MAX_QUERY_FIELDS).get(field)
    except ValueError as error:  # too many fields, or not UTF-8
        raise invalid("the query cannot be decoded") from error
    return _checked_name(field, values[0] if values else None)


def _checked_name(field: str, found: object) -> str:
    if found is None or found == "":
        raise invalid(f"field {field} is required")
    if not isinstance(found, str) or len(found) > MAX_NAME_CHARS:
        raise invalid(f"field {field} should be a string of 1..{MAX_NAME_CHARS} characters")
    return found
