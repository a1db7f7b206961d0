"""Series about what is known beyond this process: other gateways, and engines' announcements."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.observing.family import Family, Kind
from metadata_center.cache_map.values import CacheMapStats
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.subscriber import SubscriberStats
from metadata_center.sharing.sync import SyncStats

Values = dict[Family, Mapping[tuple[str, ...], float]]

SHARING_CONNECTED = Family(
    "tokenway_sharing_connected",
    Kind.GAUGE,
    "1 while the shared metadata center is caught up with and accepts what is said; no series without one.",
)
SHARING_WRITABLE = Family(
    "tokenway_sharing_writable",
    Kind.GAUGE,
    "0 while the shared metadata center can be read and accepts nothing of this gateway.",
)
SHARING_GATEWAYS = Family(
    "tokenway_sharing_gateways", Kind.GAUGE, "Gateways whose load counts here, this one included."
)
SHARING_MESSAGES = Family(
    "tokenway_sharing_messages_total",
    Kind.COUNTER,
    "Messages exchanged with other gateways: `published` were accepted, `refused` were no messages.",
    ("direction",),
)
SHARING_FAILURES = Family(
    "tokenway_sharing_failures_total", Kind.COUNTER, "Times that the shared metadata center was lost."
)
SHARING_DROPPED = Family(
    "tokenway_sharing_dropped_total",
    Kind.COUNTER,
    "Rows, members and block hashes of other gateways that found no room.",
)
SHARING_ROUND_TRIP = Family(
    "tokenway_sharing_round_trip_seconds", Kind.GAUGE, "Moving average of one exchange with the store."
)
SHARING_NAMESAKES = Family(
    "tokenway_sharing_namesakes_total",
    Kind.COUNTER,
    "Messages of another gateway of this one's name; growing, two gateways need `metadata_center.gateway`.",
)
RESERVATIONS = Family(
    "tokenway_reservations_total",
    Kind.COUNTER,
    "Choices put to compare-and-set: `placed` there, or `local` for want of an answer in time.",
    ("result",),
)
EVENT_SOURCES = Family(
    "tokenway_kv_event_sources",
    Kind.GAUGE,
    "Engines' KV event publishers that are followed, by state.",
    ("state",),
)
EVENT_BATCHES = Family("tokenway_kv_event_batches_total", Kind.COUNTER, "Batches of KV events applied.")
EVENT_FAULTS = Family(
    "tokenway_kv_event_faults_total",
    Kind.COUNTER,
    "What went wrong with KV events: `malformed` messages, `unknown_topic`, `gap` in the numbers, `restart` "
    "of a publisher, `loss` of a view that no replay made whole.",
    ("fault",),
)
EVENT_REPLAYS = Family("tokenway_kv_event_replays_total", Kind.COUNTER, "Replays asked of engines.")
MAP_BLOCKS = Family(
    "tokenway_cache_map_blocks",
    Kind.GAUGE,
    "Engine blocks in the cache map: `stored` distinct ones, `held` summed over engines, `doubted` those "
    "whose tokens may not be how the tokenizer cuts their text.",
    ("what",),
)
MAP_SKIPPED = Family(
    "tokenway_cache_map_skipped_total",
    Kind.COUNTER,
    "Announced blocks that are not in the map: `orphan` of an unknown parent, `room`, `opaque` (no text), "
    "`ignored` (another cache group or medium).",
    ("reason",),
)
MAP_CHECKS = Family(
    "tokenway_cache_map_checks_total",
    Kind.COUNTER,
    "Doubted blocks settled by the tokenizer.",
    ("result",),
)

SHARING_FAMILIES: tuple[Family, ...] = (
    SHARING_CONNECTED,
    SHARING_WRITABLE,
    SHARING_GATEWAYS,
    SHARING_MESSAGES,
    SHARING_FAILURES,
    SHARING_DROPPED,
    SHARING_ROUND_TRIP,
    SHARING_NAMESAKES,
    RESERVATIONS,
)
"""Without a sample in a gateway that shares with nobody."""

FAMILIES: tuple[Family, ...] = (
    *SHARING_FAMILIES,
    EVENT_SOURCES,
    EVENT_BATCHES,
    EVENT_FAULTS,
    EVENT_REPLAYS,
    MAP_BLOCKS,
    MAP_SKIPPED,
    MAP_CHECKS,
)


def sharing_values(stats: SyncStats, gateways: int) -> Values:
    """The series of a gateway that shares."""
    return {
        SHARING_CONNECTED: {(): stats.connected},
        SHARING_WRITABLE: {(): stats.writable},
        SHARING_GATEWAYS: {(): gateways},
        SHARING_MESSAGES: {
            ("published",): stats.published,
            ("received",): stats.received,
            ("refused",): stats.refused,
        },
        SHARING_FAILURES: {(): stats.failures},
        SHARING_DROPPED: {(): stats.dropped},
        SHARING_ROUND_TRIP: {(): stats.round_trip_s},
        SHARING_NAMESAKES: {(): stats.namesakes},
        RESERVATIONS: {("placed",): stats.reserved, ("local",): stats.reserve_timeouts},
    }


def event_values(events: SubscriberStats, caches: CacheMapStats) -> Values:
    """The series of a gateway that follows engines."""
    return {
        EVENT_SOURCES: {(state.value,): events.sources.get(state, 0) for state in SyncState},
        EVENT_BATCHES: {(): events.batches},
        EVENT_FAULTS: {
            ("malformed",): events.malformed_messages + events.malformed_batches,
            ("unknown_topic",): events.unknown_topics,
            ("gap",): events.sequence.gaps,
            ("restart",): events.sequence.restarts,
            ("loss",): events.sequence.losses,
        },
        EVENT_REPLAYS: {(): events.sequence.replays},
        MAP_BLOCKS: {
            ("stored",): caches.stored,
            ("held",): caches.held,
            ("doubted",): caches.doubted,
        },
        MAP_SKIPPED: {
            ("orphan",): caches.orphans,
            ("room",): caches.refused,
            ("opaque",): caches.opaque,
            ("ignored",): caches.ignored,
        },
        MAP_CHECKS: {("confirmed",): caches.confirmed, ("refuted",): caches.refuted},
    }
