"""Series about the other gateways with which load and history are shared."""

from __future__ import annotations

from extproc.observing.metrics.family import Family, MetricType, Values
from metadata_center.sharing.sync import SyncStats

SHARING_CONNECTED = Family(
    "tokenway_sharing_connected",
    MetricType.GAUGE,
    "1 while the shared metadata center is caught up with and accepts what is said; no series without one.",
)
SHARING_WRITABLE = Family(
    "tokenway_sharing_writable",
    MetricType.GAUGE,
    "0 while the shared metadata center can be read and accepts nothing of this gateway.",
)
SHARING_EMPTIED = Family(
    "tokenway_sharing_emptied_total",
    MetricType.COUNTER,
    "Times that the shared metadata center had lost what it was told: flushed, or evicted.",
)
SHARING_GATEWAYS = Family(
    "tokenway_sharing_gateways", MetricType.GAUGE, "Gateways whose load counts here, this one included."
)
SHARING_MESSAGES = Family(
    "tokenway_sharing_messages_total",
    MetricType.COUNTER,
    "Messages exchanged with other gateways: `published` were accepted, `refused` were no messages.",
    ("direction",),
)
SHARING_FAILURES = Family(
    "tokenway_sharing_failures_total",
    MetricType.COUNTER,
    "Times that the shared metadata center was lost, or not reached at an attempt.",
)
SHARING_DROPPED = Family(
    "tokenway_sharing_dropped_total",
    MetricType.COUNTER,
    "Rows, members and block hashes of other gateways that found no room.",
)
SHARING_ROUND_TRIP = Family(
    "tokenway_sharing_round_trip_seconds", MetricType.GAUGE, "Moving average of one exchange with the store."
)
SHARING_NAMESAKES = Family(
    "tokenway_sharing_namesakes_total",
    MetricType.COUNTER,
    "Messages of another gateway of this one's name; growing, two gateways need `metadata_center.gateway`.",
)
RESERVATIONS = Family(
    "tokenway_reservations_total",
    MetricType.COUNTER,
    "Choices put to compare-and-set: `placed` there, or `local` for want of an answer in time.",
    ("result",),
)

FAMILIES: tuple[Family, ...] = (
    SHARING_CONNECTED,
    SHARING_WRITABLE,
    SHARING_EMPTIED,
    SHARING_GATEWAYS,
    SHARING_MESSAGES,
    SHARING_FAILURES,
    SHARING_DROPPED,
    SHARING_ROUND_TRIP,
    SHARING_NAMESAKES,
    RESERVATIONS,
)
"""Without a sample in a gateway that shares with no other."""


def sharing_values(stats: SyncStats, gateways: int) -> Values:
    """The series of a gateway that shares."""
    return {
        SHARING_CONNECTED: {(): stats.connected},
        SHARING_WRITABLE: {(): stats.writable},
        SHARING_EMPTIED: {(): stats.emptied},
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
