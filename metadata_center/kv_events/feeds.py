"""Sources and the sockets they come through, while they are followed."""

from __future__ import annotations

import asyncio

from metadata_center.kv_events.sequencing import Sequencer, SyncState
from metadata_center.kv_events.sources import Source


class Feed:
    """One source and what is under way for it.

    Attributes:
        source: Where its events come from.
        sequencer: Their order.
        said: What was last said of its view.
        replay: The task that asks for what was missed, or None.
        asked_s: When it last did.
        unverified: Its publisher may be another than before.
        closed: It is no source any more: nothing of it is delivered.
        cut: There is no connection to its publisher.
    """

    __slots__ = ("asked_s", "closed", "cut", "replay", "said", "sequencer", "source", "unverified")

    def __init__(self, source: Source, sequencer: Sequencer) -> None:
        self.source = source
        self.sequencer = sequencer
        self.said = SyncState.SILENT
        self.replay: asyncio.Task[None] | None = None
        self.asked_s = float("-inf")
        self.unverified = True
        self.closed = False
        self.cut = False


class Inlet:
    """One SUB socket and the feeds behind it.

    Attributes:
        address: What it connects to, or binds.
        bind: Publishers connect to it.
        feeds: By what `name_of` says.
        task: That reads it; None until the subscriber is started.
    """

    __slots__ = ("address", "bind", "feeds", "task")

    def __init__(self, address: str, *, bind: bool) -> None:
        self.address = address
        self.bind = bind
        self.feeds: dict[str, Feed] = {}
        self.task: asyncio.Task[None] | None = None

    def feed(self, topic: bytes) -> Feed | None:
        """Whose message this is."""
        if not self.bind:
            return next(iter(self.feeds.values()), None)
        name = topic.decode("utf-8", "replace")
        feed = self.feeds.get(name)
        if feed is None and name.startswith("kv@"):
            feed = self.feeds.get(name.split("@", 2)[1])
        return feed


def name_of(source: Source) -> str:
    """What distinguishes a source from others of its socket."""
    return source.topic if source.bind else ""
