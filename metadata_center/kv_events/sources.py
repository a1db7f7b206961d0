"""Where each engine's cache events are to be had: asked of the engine, or configured.

Rules:
    1. An engine may only name itself. The host of an address must be the engine's own, or a wildcard, which
       becomes it; loopback, in whatever spelling, only if the engine is on loopback; `ipc://` likewise.
       Otherwise an engine could make the gateway connect to anything that the gateway can reach.
    2. The one exception are addresses that the operator listed as the gateway's own (`listen`): an engine
       that publishes to such an address connects to the gateway, so the gateway binds.
    3. Answers are bounded in bytes and ranks; what is not understood is an error, "no events" is not.

vLLM publishes rank r on port + r. An answer that gives all ranks the same address states the configured one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import aiohttp
import orjson

from metadata_center.addresses import MAX_PORT, Address, ip_or_none, is_loopback
from metadata_center.kv_events.errors import DiscoveryError
from metadata_center.types import EndpointKey

MAX_ANSWER_BYTES: Final = 256 * 1024
"""vLLM's answer is some 300 bytes for each rank."""

MAX_RANKS: Final = 256
"""Data-parallel ranks of one engine; the largest public deployments have some 150."""

TIMEOUT_S: Final = 2.0

_HOST: Final = re.compile(r"\*|[0-9A-Za-z_.-]+|[0-9a-f:.]+")  # a wildcard, a name or IPv4, IPv6
_IPC: Final = re.compile(r"ipc://[^\x00-\x1f]{1,100}")
_WILDCARDS: Final = frozenset({"*", "0.0.0.0", "::"})  # noqa: S104 - recognised, not bound


@dataclass(frozen=True, slots=True)
class Source:
    """One publisher: a data-parallel rank of an engine.

    Attributes:
        endpoint: The engine.
        rank: Its data-parallel rank, >= 0.
        events_address: Of the PUB socket, or where this gateway's SUB binds if `bind`.
        replay_address: Of the ROUTER socket, or None if there is no replay.
        topic: First frame of its messages. Matters only if `bind`, where many engines share a socket; `kv@`,
            the topic and `@<anything>` is then known as well.
        bind: True if the engine connects to the gateway.
    """

    endpoint: EndpointKey
    rank: int
    events_address: str
    replay_address: str | None = None
    topic: str = ""
    bind: bool = False


def configured(
    endpoint: EndpointKey,
    address: Address,
    events_address: str,
    replay_address: str | None = None,
    *,
    ranks: int = 1,
    topic: str = "",
    bind: bool = False,
) -> list[Source]:
    """Sources of an engine as an operator wrote them down, for those that cannot be asked (SGLang).

    Args:
        endpoint: The engine.
        address: Where it serves.
        events_address: Of rank 0; a wildcard host means the engine's own, unless `bind`.
        replay_address: Of rank 0, or None.
        ranks: Data-parallel ranks, 1..`MAX_RANKS`; each has the next port.
        topic: See `Source`; "" is its address.
        bind: See `Source`.

    Raises:
        ValueError: An address is malformed, or `ranks` is out of range.
    """
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"{ranks} ranks")
    events = events_address if bind else _reachable(events_address, address)
    replay = None if replay_address is None else _reachable(replay_address, address)
    return [
        Source(
            endpoint,
            rank,
            with_port_offset(events, rank),
            None if replay is None else with_port_offset(replay, rank),
            _topic(topic, address, bind=bind),
            bind,
        )
        for rank in range(ranks)
    ]


def with_port_offset(address: str, offset: int) -> str:
    """The address `offset` ports further.

    Raises:
        ValueError: It is no `tcp://` or `ipc://` address, the port leaves 1..65535, or an `ipc://` address
            was to be moved.
    """
    if _IPC.fullmatch(address) and not offset:
        return address
    place = _split(address)
    if not 0 < place.port + offset <= MAX_PORT:
        raise ValueError(f"port {place.port} + {offset}")
    return f"tcp://{place._replace(port=place.port + offset)}"


async def discover(
    session: aiohttp.ClientSession,
    endpoint: EndpointKey,
    address: Address,
    *,
    listen: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    tls: Mapping[str, Any] | None = None,
) -> list[Source]:
    """Ask an engine where its events are: `GET /kv_event_sources`, one request.

    Args:
        session: Shared; its connections are kept.
        endpoint: The engine.
        address: Where it serves.
        listen: Addresses that engines publish to at this gateway, of rank 0 -> address to bind for it:
            `{"tcp://10.0.0.9:5557": "tcp://*:5557"}`. Never connected to.
        timeout_s: For the whole answer.
        tls: Given to aiohttp with the request if the engine speaks TLS.

    Returns:
        Its sources by rank; none if it has no events or does not know the question (404).

    Raises:
        DiscoveryError: It did not answer, or not with what it may say.
    """
    try:
        async with session.get(
            f"{'https' if tls else 'http'}://{address}/kv_event_sources",
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **(tls or {}),
        ) as response:
            if response.status == HTTPStatus.NOT_FOUND:
                return []
            if response.status != HTTPStatus.OK:
                raise DiscoveryError(f"status {response.status}")
            chunks, size = [], 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > MAX_ANSWER_BYTES:
                    raise DiscoveryError(f"more than {MAX_ANSWER_BYTES} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise DiscoveryError("timeout") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise DiscoveryError(type(error).__name__) from None
    return parse_sources(b"".join(chunks), endpoint, address, listen or {})


def parse_sources(
    answer: bytes, endpoint: EndpointKey, address: Address, listen: Mapping[str, str]
) -> list[Source]:
    """Sources in the body of an answer; see `discover`.

    vLLM 0.32 answers with an object of ranks, later ones with an array whose entries name their rank.

    Raises:
        DiscoveryError: It is not understood or says what it may not say.
    """
    try:
        entries = sorted(_entries(orjson.loads(answer)), key=lambda entry: entry[0])
        base_events, base_replay = (
            (entries[0][1].get("endpoint"), entries[0][1].get("replay_endpoint")) if entries else (None, None)
        )
        sources = []
        for rank, entry in entries:
            if (
                entry.get("publisher", "zmq") != "zmq"
                or entry.get("enable_kv_cache_events", True) is not True
            ):
                continue
            topic, events, replay = entry.get("topic") or "", entry["endpoint"], entry.get("replay_endpoint")
            if not isinstance(topic, str) or len(topic) > 1024:
                raise ValueError("the topic is no short string")
            events_offset = rank - entries[0][0] if events == base_events else 0
            replay_offset = rank - entries[0][0] if replay == base_replay else 0
            bound = _bound(events, rank, listen)
            sources.append(
                Source(
                    endpoint,
                    rank,
                    bound or with_port_offset(_at_engine(events, address), events_offset),
                    with_port_offset(_at_engine(replay, address), replay_offset) if replay else None,
                    _topic(topic, address, bind=bound is not None),
                    bound is not None,
                )
            )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DiscoveryError(f"{type(error).__name__}: {error}"[:200]) from None
    return sources


def _entries(answer: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    if len(answer) > MAX_RANKS:
        raise ValueError("too many ranks")
    if isinstance(answer, dict):
        found = [(int(rank), entry) for rank, entry in answer.items()]
    elif isinstance(answer, list):
        found = [(entry.get("data_parallel_rank") or 0, entry) for entry in answer]
    else:
        raise TypeError("neither an object nor an array")
    ranks = {rank for rank, _ in found}
    if len(ranks) != len(found) or not all(type(rank) is int and 0 <= rank < MAX_RANKS for rank in ranks):
        raise ValueError("ranks are not distinct small integers")
    return found


def _bound(events: Any, rank: int, listen: Mapping[str, str]) -> str | None:
    """Where to bind if `events` is one of the gateway's own addresses, as configured or of the rank."""
    for advertised, bind in listen.items():
        if events in (advertised, with_port_offset(advertised, rank)):
            return with_port_offset(bind, rank)
    return None


def _topic(written: str, address: Address, *, bind: bool) -> str:
    """What distinguishes an engine's messages from others of the same socket."""
    return written or (str(address) if bind else "")


def _at_engine(found: Any, engine: Address) -> str:
    """The address with a host that is the engine's own.

    Raises:
        ValueError: It names another host, or is not an address.
    """
    if not isinstance(found, str):
        raise ValueError("an address is not a string")
    own = engine.host
    reachable = _reachable(found, engine)
    if _IPC.fullmatch(reachable):
        is_own = _is_local(own)
    else:
        host = _split(reachable).host
        is_own = _same_host(host, own) or (_is_local(host) and _is_local(own))
    if not is_own:
        raise ValueError("the address is not the engine's own")
    return reachable


def _reachable(address: str, engine: Address) -> str:
    """The address with the engine's host in place of a wildcard.

    Raises:
        ValueError: It is not an address.
    """
    if _IPC.fullmatch(address):
        return address
    place = _split(address)
    return f"tcp://{place._replace(host=engine.host) if place.host in _WILDCARDS else place}"


def _split(address: str) -> Address:
    if not address.startswith("tcp://"):
        raise ValueError("not a tcp:// address with a port")
    place = Address.parse(address.removeprefix("tcp://"), lowest_port=1)
    if not _HOST.fullmatch(place.host):
        raise ValueError("not a tcp:// address with a port")
    return place


def _same_host(one: str, other: str) -> bool:
    return (ip_or_none(one) or one.lower()) == (ip_or_none(other) or other.lower())


def _is_local(host: str) -> bool:
    return host.lower() == "localhost" or is_loopback(host)
