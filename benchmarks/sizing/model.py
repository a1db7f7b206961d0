"""What is computed: the costs of gateways over endpoints, by their numbers, from those of single things."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from metadata_center.load.counters import MAX_SLOTS, num_bytes
from metadata_center.sharing.store import HEARTBEATS_PER_LEASE
from metadata_center.sharing.sync import MESSAGES_PER_S

ENDPOINTS: Final = (10, 100, 1_000)
GATEWAYS: Final = (1, 4, 16)
CHANGES_PER_REQUEST: Final = 3
LEASE_S: Final = 6.0
"""The default of `metadata_center.lease_s`."""

NEW_TOKENS: Final = 2_000
"""Announced per request: half of a prompt of 16 KiB, and the answer."""

BLOCK_TOKENS: Final = 16
"""vLLM's default on GPUs."""

BLOCK_BYTES: Final = 512
"""The default of `request.block_bytes`."""

TOKENS_PER_BYTE: Final = 0.25
"""What the gateway starts with, before it learned a model's."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a message: its first row with all that every message has, each further row, and a prompt's chain."""

    first_row: float
    row: float
    chain: float

    def of(self, rows: float, chains: float) -> float:
        """Of a message with so many rows, >= 1, and chains; also for means of many messages."""
        return self.first_row + self.row * (rows - 1.0) + self.chain * chains


@dataclass(frozen=True, slots=True)
class Unit:
    """What was measured. Times are CPU seconds.

    Attributes:
        in_bytes: Into Redis, per message.
        out_bytes: Out of Redis, per message and member, per subscription.
        redis_s: Of Redis, per message, without subscribers.
        delivery_s: Of Redis, per message and subscriber.
        send_s: Of a gateway, per message sent, by number of rows.
        receive_s: Of a gateway, per message received.
        compare_s: Of a gateway, to find what changed, by number of endpoints.
        reserve_s: Of Redis, for a message with one reservation, by number of members with a share.
        share_bytes: In Redis, by number of rows.
        connection_bytes: In Redis, per connection.
        peer_row_bytes: In a gateway, per row of another member.
        history_block_bytes: In a gateway, per block and endpoint that holds it.
        announced_block_bytes: In a gateway, per announced block that one engine holds.
        announced_block_s: Of a gateway, to take an announced block in and, later, its removal.
    """

    in_bytes: Cost
    out_bytes: Cost
    redis_s: Cost
    delivery_s: float
    send_s: Cost
    receive_s: Cost
    compare_s: dict[int, float]
    reserve_s: dict[int, float]
    share_bytes: dict[int, int]
    connection_bytes: float
    peer_row_bytes: float
    history_block_bytes: float
    announced_block_bytes: float
    announced_block_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is assumed.

    Attributes:
        requests_per_s: Per gateway, > 0.
        round_trip_s: From a gateway to Redis and back.
        answer_s: Mean time from decision to end.
        kv_tokens: KV cache of one engine.
    """

    requests_per_s: float
    round_trip_s: float
    answer_s: float
    kv_tokens: int


def messages_per_s(changes_per_s: float, pause_s: float) -> float:
    """Messages that changes at random moments make, if one leaves at once or when `pause_s` are over.

    After a message the next one leaves after the pause if anything changed in it, else with the next change:
    on average `pause_s + exp(-changes_per_s * pause_s) / changes_per_s` later.
    """
    return 1.0 / (pause_s + math.exp(-changes_per_s * pause_s) / changes_per_s)


def distinct(draws: float, endpoints: int) -> float:
    """Endpoints hit by so many draws, each of them at random."""
    missed: float = (1.0 - 1.0 / endpoints) ** draws
    return endpoints * (1.0 - missed)


def traffic(load: Load, endpoints: int, members: int) -> tuple[float, float, float]:
    """Messages per second of each member, and their mean numbers of rows and chains.

    Heartbeats are among them, which list all endpoints with load.
    """
    changes_per_s = CHANGES_PER_REQUEST * load.requests_per_s
    pause_s = max(load.round_trip_s, members / MESSAGES_PER_S)
    sent = messages_per_s(changes_per_s, pause_s)
    full = min(sent, HEARTBEATS_PER_LEASE / LEASE_S)
    loaded = distinct(load.requests_per_s * load.answer_s, endpoints)
    rows = ((sent - full) * distinct(changes_per_s / sent, endpoints) + full * loaded) / sent
    return sent, max(1.0, rows), load.requests_per_s / sent


def between(points: dict[int, float], x: float) -> float:
    """The value at `x` on the straight lines between points; beyond them, in proportion."""
    known = sorted(points)
    if x <= known[0]:
        return points[known[0]]
    for low, high in pairwise(known):
        if x <= high:
            return points[low] + (points[high] - points[low]) * (x - low) / (high - low)
    return points[known[-1]] * x / known[-1]


def sized(unit: Unit, load: Load, endpoints: int, members: int) -> dict[str, float]:
    """One row of the table: `members` gateways of one worker each, over `endpoints`."""
    sent, rows, chains = traffic(load, endpoints, members)
    accepted = sent * members
    listed = distinct(load.requests_per_s * (load.answer_s + LEASE_S / HEARTBEATS_PER_LEASE), endpoints)
    share_bytes = between({n: float(size) for n, size in unit.share_bytes.items()}, listed)
    engine_blocks = load.kv_tokens / BLOCK_TOKENS
    history_blocks = load.kv_tokens / TOKENS_PER_BYTE / BLOCK_BYTES
    redis_s = unit.redis_s.of(rows, chains) + members * unit.delivery_s
    send_s = unit.send_s.of(rows, chains) + between(unit.compare_s, endpoints)
    reserved = load.requests_per_s * members
    return {
        "redis_memory_kib": members * (share_bytes + 2 * unit.connection_bytes) / 1024,
        "messages_per_s": accepted,
        "rows_per_message": rows,
        "deliveries_per_s": accepted * members,
        "redis_in_mbit_per_s": accepted * unit.in_bytes.of(rows, chains) * 8e-6,
        "redis_out_mbit_per_s": accepted * members * unit.out_bytes.of(rows, chains) * 8e-6,
        "redis_cpu_percent": accepted * redis_s * 100,
        "gateway_send_cpu_percent": sent * send_s * 100,
        "gateway_receive_cpu_percent": accepted * unit.receive_s.of(rows, chains) * 100,
        "gateway_events_cpu_percent": reserved * NEW_TOKENS / BLOCK_TOKENS * unit.announced_block_s * 100,
        "reserve_redis_cpu_percent": reserved * between(unit.reserve_s, members) * 100,
        "shares_mib": ((members - 1) * listed * unit.peer_row_bytes + num_bytes(1, MAX_SLOTS)) / 2**20,
        "history_mib": endpoints * history_blocks * unit.history_block_bytes / 2**20,
        "cache_map_mib": endpoints * engine_blocks * unit.announced_block_bytes / 2**20,
        "cache_map_blocks": endpoints * engine_blocks,
    }


def rounded(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")
