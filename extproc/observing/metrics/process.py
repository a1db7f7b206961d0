"""Series of the process itself."""

from __future__ import annotations

from enum import StrEnum

from extproc.observing.metrics.family import Family, MetricType, Values, closed

_STALL_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class StallCause(StrEnum):
    """What took most of a long turn of the event loop; a metric label."""

    GC = "gc"
    OTHER = "other"
    WAITING = "waiting"


LOOP_STALLS = Family(
    "tokenway_loop_stall_seconds",
    MetricType.HISTOGRAM,
    "Turns of the event loop that took more than 5 ms by the clock, in which no other request went on. "
    "`waiting` took less than that of processor time: another process, or another thread, had it. Of most of "
    "the others' processor time garbage collection is the cause (`gc`), or not (`other`).",
    ("cause",),
    _STALL_BUCKETS,
)
STALL_CPU = Family(
    "tokenway_loop_stall_cpu_seconds",
    MetricType.HISTOGRAM,
    "Processor time of those of them that took more than 5 ms of it; on a virtual machine it may have "
    "pauses of the host, where that does not report them.",
    ("cause",),
    _STALL_BUCKETS,
)
LONGEST_STALL = Family(
    "tokenway_loop_longest_stall_seconds",
    MetricType.GAUGE,
    "The longest turn by the clock since the start; 0 if none took more than 5 ms.",
    ("cause",),
    start=closed(StallCause),
)

LOG_LINES_LOST = Family(
    "tokenway_log_lines_lost_total",
    MetricType.COUNTER,
    "Log lines that were lost: nobody read the log and 1 MiB of it waited, or it was refused (a full disk).",
)
SOCKETS_IN_PLACE = Family(
    "tokenway_sockets_in_place",
    MetricType.GAUGE,
    "1 while the names of the gateway's Unix sockets lead to them, else 0: somebody took files out of "
    "`server.run_dir`, they cannot be made anew, and no new connection of Envoy's comes.",
)
SOCKET_RENEWALS = Family(
    "tokenway_socket_renewals_total",
    MetricType.COUNTER,
    "Files of the gateway in `server.run_dir` that somebody took away, and that were made anew.",
)
EXPLAIN_RECORDS = Family(
    "tokenway_explain_records",
    MetricType.GAUGE,
    "Decisions held for `tokenway explain`; bounded by configuration.",
)
BUILD_INFO = Family(
    "tokenway_build_info",
    MetricType.GAUGE,
    "Always 1; `build` says whether the request path is `compiled` or `pure` Python.",
    ("version", "python", "build"),
)

FAMILIES: tuple[Family, ...] = (
    LOOP_STALLS,
    STALL_CPU,
    LONGEST_STALL,
    LOG_LINES_LOST,
    SOCKETS_IN_PLACE,
    SOCKET_RENEWALS,
    EXPLAIN_RECORDS,
)
"""All but what is constant."""


def process_values(log_lines_lost: int, socket_renewals: int, *, are_sockets_in_place: bool) -> Values:
    """The series that are read when scraped, but for that of decision records."""
    return {
        LOG_LINES_LOST: {(): log_lines_lost},
        SOCKETS_IN_PLACE: {(): are_sockets_in_place},
        SOCKET_RENEWALS: {(): socket_renewals},
    }
