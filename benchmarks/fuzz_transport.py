"""Mutated bytes for our HTTP/2: whatever a peer sends ends in a fault or in an answer, never in an exception.

    make fuzz-transport          (python -m benchmarks.fuzz_transport --inputs 1000000)

An input is a conversation of well-formed frames, of which a few were changed: bits, lengths, kinds, order,
cuts. Besides exceptions, it looks for what a peer could make us hold, calls and unsent bytes beyond their
bounds, and for calls that hear of anything after their end.

The last line says how many inputs there were, and how they ended.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence

from extproc.transport.http2 import frames
from extproc.transport.http2.calls import MAX_STREAMS
from extproc.transport.http2.connection import Connection
from extproc.transport.http2.faults import FaultReason
from extproc.transport.http2.headers import encode
from extproc.transport.http2.outbox import MAX_UNSENT_BYTES
from extproc.transport.seam import Call, Received, Rpc, Status

_MAX_MESSAGE_BYTES = 100_000
_FIELDS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/fuzz.Fuzz/Call"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
)


class _Whimsical:
    """A service that answers, finishes, aborts or raises at random, and asserts that calls come in order."""

    def __init__(self, call: Call, rng: random.Random) -> None:
        self._call = call
        self._rng = rng
        self._is_over = self._is_half_closed = False

    def on_message(self, message: Received) -> None:
        """See `Receiver`."""
        assert not self._is_over
        assert not self._is_half_closed
        assert len(message) <= _MAX_MESSAGE_BYTES
        self._act(bytes(message))

    def on_half_close(self) -> None:
        """See `Receiver`."""
        assert not self._is_over
        assert not self._is_half_closed
        self._is_half_closed = True
        self._act(b"")

    def on_reset(self) -> None:
        """See `Receiver`."""
        assert not self._is_over
        self._is_over = True

    def _act(self, message: bytes) -> None:
        match self._rng.randrange(8):
            case 0:
                self._is_over = True
                self._call.finish(message)
            case 1:
                self._is_over = True
                self._call.abort(Status.INTERNAL, "whim")
            case 2:
                self._is_over = True
                raise _WhimError
            case 3 | 4 | 5:
                self._call.send(message)


class _WhimError(Exception):
    """Raised by the service on purpose."""


class _Notices:
    def __init__(self) -> None:
        self.ended: FaultReason | None = None

    def fault(self, reason: FaultReason, _: str, *, is_connection: bool) -> None:
        """See `Notices`."""
        if is_connection:
            assert self.ended is None
            self.ended = reason

    def bug(self, _: str, error: Exception) -> None:
        """See `Notices`."""
        if not isinstance(error, _WhimError):
            raise error


def conversation(rng: random.Random) -> list[bytes]:
    """Well-formed frames behind the preface."""
    sent = [frames.settings({frames.INITIAL_WINDOW_SIZE: rng.choice([0, 1, 65_535, frames.GREATEST_WINDOW])})]
    sent.append(frames.SETTINGS_ACK)
    stream_id = -1
    for _ in range(rng.randrange(1, 12)):
        match rng.randrange(9):
            case 0 | 1 | 2:
                stream_id += 2
                more = ((b"grpc-timeout", b"1m"),) if rng.random() < 0.2 else ()
                flags = frames.END_HEADERS | (rng.random() < 0.1)
                sent.append(frames.frame(frames.HEADERS, flags, stream_id, encode((*_FIELDS, *more))))
            case 3 | 4 | 5 if stream_id > 0:
                message = rng.randbytes(rng.choice([0, 1, 10, 1_000]))
                prefix = b"\0" + (len(message) + rng.choice([0, 0, 0, 1, 90_000])).to_bytes(4)
                flags = rng.random() < 0.3
                sent.append(
                    frames.frame(frames.DATA, flags, rng.randrange(1, stream_id + 1, 2), prefix + message)
                )
            case 6:
                sent.append(
                    frames.window_update(max(0, stream_id * rng.randrange(2)), rng.choice([1, 70_000]))
                )
            case 7 if stream_id > 0:
                sent.append(frames.rst_stream(stream_id, rng.randrange(14)))
            case _:
                sent.append(frames.frame(rng.choice([2, 6, 8, 9, 0xFA]), 0, 0, rng.randbytes(8)))
    return sent


def mutated(rng: random.Random, sent: Sequence[bytes]) -> bytes:
    """The conversation as bytes, some of which were changed."""
    order = list(sent)
    for _ in range(rng.randrange(4)):
        which = rng.randrange(len(order))
        match rng.randrange(4):
            case 0:
                order.insert(rng.randrange(len(order)), order[which])
            case 1:
                order[which], order[0] = order[0], order[which]
            case 2 if len(order[which]) >= frames.HEAD_BYTES:
                head = bytearray(order[which])
                changed = rng.choice([0, 1, 4, 5, 8, 0x20, 0xFF, rng.randrange(256)])
                head[rng.randrange(frames.HEAD_BYTES)] = changed
                order[which] = bytes(head)
            case _:
                order[which] = order[which][: rng.randrange(len(order[which]) + 1)]
    data = bytearray(b"".join(order))
    for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    preface = frames.PREFACE if rng.random() < 0.99 else frames.PREFACE[: rng.randrange(24)]
    return preface + bytes(data)


def play(seed: int) -> str:
    """One input; how it ended.

    Raises:
        Exception: Whatever a peer could make us raise; `AssertionError` where a rule of ours is broken.
    """
    rng, notices = random.Random(seed), _Notices()
    rpc = Rpc("fuzz.Fuzz", "Call", lambda call: _Whimsical(call, rng))
    connection = Connection({rpc.path: rpc}, _MAX_MESSAGE_BYTES, "", notices, lambda: None, 0.0)
    data, at, now_s = mutated(rng, conversation(rng)), 0, 0.0
    while at < len(data):
        step = rng.choice([1, 9, 100, 100_000])
        connection.receive(data[at : at + step], now_s)
        at, now_s = at + step, now_s + 0.001
        if rng.random() < 0.5:
            connection.outbox.is_blocked = rng.random() < 0.1
            while connection.take():
                pass
            connection.outbox.notify_sent()
        connection.expire(now_s)
        assert connection.num_streams <= MAX_STREAMS
        assert 0 <= connection.outbox.unsent_bytes <= MAX_UNSENT_BYTES + _MAX_MESSAGE_BYTES
    connection.end()
    assert connection.num_streams == 0
    assert connection.outbox.unsent_bytes == 0
    return "answered" if notices.ended is None else notices.ended.value


def main() -> None:
    """Play inputs until there are enough; the seed of one that raises is printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    endings: Counter[str] = Counter()
    began_s = time.monotonic()
    for seed in range(options.first_seed, options.first_seed + options.inputs):
        try:
            endings[play(seed)] += 1
        except Exception:
            print(f"seed {seed}", flush=True)
            raise
        if seed % 100_000 == 99_999:
            print(f"{seed + 1} in {time.monotonic() - began_s:.0f} s", flush=True)
    print(f"{endings.total()} inputs: {dict(endings.most_common())}")


if __name__ == "__main__":
    main()
