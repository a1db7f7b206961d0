"""Series about engines' KV events, and about the map of what they say is cached."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType, Values
from metadata_center.cache_map.values import CacheMapStats
from metadata_center.kv_events.sequencing import SyncState
from metadata_center.kv_events.statistics import SubscriberStats

EVENT_SOURCES = Family(
    "tokenway_kv_event_sources",
    MetricType.GAUGE,
    "Engines' KV event publishers that are followed, by state.",
    ("state",),
)
EVENT_BATCHES = Family("tokenway_kv_event_batches_total", MetricType.COUNTER, "Batches of KV events applied.")
EVENT_FAULTS = Family(
    "tokenway_kv_event_faults_total",
    MetricType.COUNTER,
    "What went wrong with KV events: `malformed` messages, `unreadable` events in others, `unknown_topic`, "
    "`gap` in the numbers, `restart` of a publisher, `loss` of a view that no replay made whole.",
    ("fault",),
)
EVENT_REPLAYS = Family("tokenway_kv_event_replays_total", MetricType.COUNTER, "Replays asked of engines.")
MAP_BLOCKS = Family(
    "tokenway_cache_map_blocks",
    MetricType.GAUGE,
    "Engine blocks in the cache map: `stored` distinct ones, `held` summed over engines, `doubted` those "
    "whose tokens may not be how the tokenizer cuts their text.",
    ("what",),
)
MAP_SKIPPED = Family(
    "tokenway_cache_map_skipped_total",
    MetricType.COUNTER,
    "Announced blocks that are not in the map: `orphan` of an unknown parent, `room`, `opaque` (no text), "
    "`ignored` (another cache group or medium).",
    ("reason",),
)
MAP_CHECKS = Family(
    "tokenway_cache_map_checks_total",
    MetricType.COUNTER,
    "Doubted blocks settled by the tokenizer.",
    ("result",),
)


FAMILIES: tuple[Family, ...] = (
    EVENT_SOURCES,
    EVENT_BATCHES,
    EVENT_FAULTS,
    EVENT_REPLAYS,
    MAP_BLOCKS,
    MAP_SKIPPED,
    MAP_CHECKS,
)


def event_values(events: SubscriberStats, caches: CacheMapStats) -> Values:
    """The series of a gateway that follows engines."""
    return {
        EVENT_SOURCES: {(state.value,): events.sources.get(state, 0) for state in SyncState},
        EVENT_BATCHES: {(): events.batches},
        EVENT_FAULTS: {
            ("malformed",): events.malformed_messages + events.malformed_batches,
            ("unreadable",): events.unreadable_events,
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
