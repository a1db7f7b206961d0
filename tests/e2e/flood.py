"""`python -m tests.e2e.flood EVENTS_PORT REPLAY_PORT BATCHES SUBSCRIBERS`: an engine that has gone mad.

Waits for its subscribers, announces blocks that no prompt has as fast as it can, prints what it sent as JSON,
and answers replays until it is killed.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from itertools import count
from typing import Final

import msgspec
import zmq

from tokenway.simulator.server.kv_events import REPLAY_END, BlockStored, EventBatch

BLOCKS: Final = 4
BLOCK_TOKENS: Final = 16
FIRST_TOKEN: Final = 1
TOKENS: Final = 700
PROMPTS: Final = 1_000
"""Made before: the first token of each differs from batch to batch."""

HIGH_WATER_MARK: Final = 100_000
"""vLLM's default, as are the batches kept for replay."""

BUFFER_STEPS: Final = 10_000
POLL_EVERY: Final = 64  # batches between two looks at the replay socket


def main(events_port: int, replay_port: int, num_batches: int, subscribers: int) -> None:
    """Flood."""
    context = zmq.Context()
    pub = context.socket(zmq.XPUB)
    pub.setsockopt(zmq.XPUB_VERBOSE, 1)
    pub.sndhwm = HIGH_WATER_MARK
    pub.bind(f"tcp://127.0.0.1:{events_port}")
    router = context.socket(zmq.ROUTER)
    router.bind(f"tcp://127.0.0.1:{replay_port}")
    for _ in range(subscribers):
        pub.recv()
    rng = random.Random(7)
    encoder = msgspec.msgpack.Encoder()
    kept: deque[tuple[bytes, bytes]] = deque(maxlen=BUFFER_STEPS)
    hashes = count(1)
    prompts = [
        [rng.randrange(FIRST_TOKEN, TOKENS) for _ in range(BLOCKS * BLOCK_TOKENS)] for _ in range(PROMPTS)
    ]
    started_s = time.monotonic()
    for number in range(num_batches):
        event = BlockStored(
            [next(hashes) for _ in range(BLOCKS)],
            None,
            [FIRST_TOKEN + number // PROMPTS, *prompts[number % PROMPTS][1:]],
            BLOCK_TOKENS,
            None,
            "GPU",
            None,
        )
        message = number.to_bytes(8, "big"), encoder.encode(EventBatch(time.time(), [event], 0))
        kept.append(message)
        pub.send_multipart((b"", *message))
        if number % POLL_EVERY == 0:
            answer(router, kept, 0)
    seconds = time.monotonic() - started_s
    print(json.dumps({"batches": num_batches, "seconds": round(seconds, 2)}), flush=True)
    while True:
        answer(router, kept, 1_000)


def answer(router: zmq.Socket[bytes], kept: deque[tuple[bytes, bytes]], timeout_ms: int) -> None:
    """Serve a replay if one is asked for."""
    if not router.poll(timeout_ms):
        return
    peer, _, start = router.recv_multipart()
    for number, payload in kept:
        if number >= start:
            router.send_multipart((peer, b"", b"", number, payload))
    router.send_multipart((peer, b"", b"", REPLAY_END, b""))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
