"""Round-robin turns, one sequence for each stream of requests: streams that alternate must not share them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from extproc.choosing.rotation import Rotation
from extproc.request.rules import Route

MAX_ROTATIONS: Final = 4096
"""Turns kept, some 100 bytes and 8 for each endpoint: names times rules of a large configuration. Of more,
the one least recently used begins anew."""

_Stream = tuple[str, str | None, str | None, str, tuple[tuple[str, str], ...]]
"""The client's name for the model, the rule's name, its adapter, cluster and labels."""


class Rotations:
    """The turns of one worker."""

    def __init__(self) -> None:
        self._rotations: OrderedDict[_Stream, Rotation] = OrderedDict()

    def of(self, name: str, route: Route) -> Rotation:
        """Those of requests that ask for `name` and go by one rule."""
        subset = tuple(route.subset.items()) if route.subset else ()
        stream = (name, route.route_name, route.lora, route.cluster, subset)
        rotation = self._rotations.get(stream)
        if rotation is None:
            if len(self._rotations) >= MAX_ROTATIONS:
                self._rotations.popitem(last=False)
            rotation = self._rotations[stream] = Rotation(len(self._rotations))
        else:
            self._rotations.move_to_end(stream)
        return rotation
