"""Whose a publisher is, where more than one endpoint says that it is theirs.

Rules:
    1. An endpoint is followed with all of its sources or not at all.
    2. Who is followed already stays; of others the first that said so is followed. So no endpoint takes a
       publisher away from another, or keeps others from being followed, by what it answers.
    3. At most `MAX_SOURCES` sources; an endpoint that they have no room for is left out, and no other for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from metadata_center.kv_events.feeds import name_of
from metadata_center.kv_events.sources import Source
from metadata_center.types import EndpointKey

MAX_SOURCES: Final = 1_024
"""Publishers that are followed at once."""


def refused(
    said: Mapping[EndpointKey, Sequence[Source]], followed: Collection[Source], most: int = MAX_SOURCES
) -> dict[EndpointKey, str]:
    """The endpoints that are not to be followed, each with the reason.

    Args:
        said: What each endpoint says its sources are, in the order in which they said so.
        followed: Sources that are followed now.
        most: Sources that may be followed.
    """
    reasons: dict[EndpointKey, str] = {}
    owners: dict[tuple[str, bool, str], EndpointKey] = {}
    for key in sorted(said, key=lambda key: not all(source in followed for source in said[key])):
        names = [(source.events_address, source.bind, name_of(source)) for source in said[key]]
        taken = next((owners[name] for name in names if name in owners), None)
        if taken is not None:
            reasons[key] = f"it names a publisher of {taken}"
        elif len(set(names)) < len(names):
            reasons[key] = "two of its ranks have one publisher"
        elif len(owners) + len(names) > most:
            reasons[key] = f"more than {most} publishers"
        else:
            owners.update(dict.fromkeys(names, key))
    return reasons
