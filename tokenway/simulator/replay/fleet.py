"""The replicas of a run: which profiles, how many, and the what-ifs on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Any, Final

from metadata_center.types import EndpointKey
from tokenway.simulator.engine.profile import PROFILES, EngineProfile
from tokenway.simulator.replay.trace import Trace

MAX_COPIES: Final = 9_999
"""Of one profile: a fleet is a few hundred, and a slip of the finger is not to take all memory."""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica.

    Attributes:
        profile: Its speed and size; its name is the endpoint's group.
        weight: Its relative capacity as an operator would configure it, > 0.
    """

    profile: EngineProfile
    weight: float = 1.0


Fleet = tuple[Member, ...]


def parse_fleet(text: str, profiles: Mapping[str, EngineProfile] = PROFILES) -> Fleet:
    """A fleet from `name:count[:weight],...`, such as `llama8b-h100:6,llama8b-a100:2:0.4`.

    Raises:
        ValueError: It is not of that form, or a profile is not known.
    """
    members: list[Member] = []
    for part in text.split(","):
        name, _, rest = part.strip().partition(":")
        count, _, weight = rest.partition(":")
        if name not in profiles:
            raise ValueError(f"fleet: no profile is called {name!r}; there are {', '.join(profiles)}")
        try:
            member, copies = Member(profiles[name], float(weight or 1.0)), int(count or 1)
        except ValueError:
            raise ValueError(f"fleet: {part!r} is not name:count[:weight]") from None
        if not (0 < copies <= MAX_COPIES and 0.0 < member.weight < inf):
            raise ValueError(f"fleet: {part!r}: count and weight must be positive, of {MAX_COPIES} at most")
        members += [member] * copies
    return tuple(members)


def profiles_from(document: Any) -> dict[str, EngineProfile]:
    """The known profiles and those of a decoded JSON object.

    It maps names to fields of `EngineProfile`; `base` names a profile that gives the fields left out.

    Raises:
        ValueError: A field is unknown, missing or out of range.
    """
    if not isinstance(document, dict):
        raise ValueError("profiles: an object of profiles by name is expected")
    known = {field.name for field in fields(EngineProfile)} - {"name"}
    found = dict(PROFILES)
    for name, given in document.items():
        if not isinstance(given, dict):
            raise ValueError(f"profile {name}: an object is expected")
        values = {key: value for key, value in given.items() if key != "base"}
        if values.keys() - known:
            raise ValueError(f"profile {name}: unknown fields {', '.join(sorted(values.keys() - known))}")
        try:
            if "base" in given:
                found[name] = replace(found[given["base"]], name=name, **values)
            else:
                found[name] = EngineProfile(name=name, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"profile {name}: {error}") from None
    return found


def scaled_kv(fleet: Fleet, factor: float) -> Fleet:
    """The fleet with `factor` times the KV cache in every replica.

    Raises:
        ValueError: Less than one block would be left.
    """
    return tuple(
        replace(member, profile=replace(member.profile, kv_tokens=int(member.profile.kv_tokens * factor)))
        for member in fleet
    )


def endpoint_keys(fleet: Iterable[Member]) -> tuple[EndpointKey, ...]:
    """Addresses for a fleet's members, distinct."""
    return tuple(EndpointKey(f"10.0.{row // 250}.{row % 250 + 1}:8000") for row, _ in enumerate(fleet))


def fitting_block_size(trace: Trace, fleet: Fleet) -> int:
    """Tokens per block of all engines, each of which has room for each request.

    Raises:
        ValueError: The fleet is empty or mixes block sizes, or a request fits no engine's cache.
    """
    sizes = {member.profile.block_size for member in fleet}
    if len(sizes) != 1:
        raise ValueError("a fleet has at least one replica and one block size")
    (size,) = sizes
    smallest = min(member.profile.num_blocks for member in fleet) * size
    for index, request in enumerate(trace.requests):
        if request.prompt_tokens + request.output_tokens > smallest:
            raise ValueError(f"request {index} of {trace.name} does not fit {smallest} tokens of KV cache")
    return size
