"""What a subscriber counts."""

from __future__ import annotations

from dataclasses import dataclass, field

from metadata_center.kv_events.sequencing import SequenceStats, SyncState


@dataclass(slots=True)
class SubscriberStats:
    """Counts since the start, and how the sources are.

    Attributes:
        batches: Handed to `on_batch`.
        malformed_messages: Without the frames of a message.
        malformed_batches: That could not be decoded.
        unreadable_events: Left out of batches that could.
        unknown_topics: Messages to a bound socket that no source expects.
        callback_errors: Exceptions of callbacks.
        sources: By state; every state is a key.
        sequence: Sums over the present sources.
    """

    batches: int = 0
    malformed_messages: int = 0
    malformed_batches: int = 0
    unreadable_events: int = 0
    unknown_topics: int = 0
    callback_errors: int = 0
    sources: dict[SyncState, int] = field(default_factory=dict)
    sequence: SequenceStats = field(default_factory=SequenceStats)
