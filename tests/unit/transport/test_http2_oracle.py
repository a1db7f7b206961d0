"""Ours as the server of a client by others: whatever windows, cuts, padding and resets, all is echoed.

The client is the `h2` library, which is strict: it raises for whatever RFC 9113 forbids us.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from h2.settings import SettingCodes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc.transport.http2 import frames
from tests.http2_peers import CALL_FIELDS, MAX_MESSAGE_BYTES, Served, framed, parsed

MAX_TURNS = 200_000
TURN_S = 0.1
"""So that a client that often changes its mind is not taken for a flood."""


class Client:
    """Calls with messages to echo, sent as far as windows allow.

    Args:
        rng: For all that is left open.
        window: SETTINGS_INITIAL_WINDOW_SIZE of the client.
        messages: Of each call.
        is_patient: No call is given up.
    """

    def __init__(
        self, rng: random.Random, window: int, messages: list[list[bytes]], *, is_patient: bool
    ) -> None:
        self.rng = rng
        self._is_patient = is_patient
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self.h2.local_settings = type(self.h2.local_settings)(
            client=True,
            initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window, SettingCodes.ENABLE_PUSH: 0},
        )
        self.h2.initiate_connection()
        self._unopened = list(messages)
        self.sending: dict[int, bytes] = {}
        self.expected: dict[int, bytes] = {}
        self.received: dict[int, bytes] = {}
        self.status: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.given_up: set[int] = set()

    @property
    def is_done(self) -> bool:
        """Every call has ended or was given up."""
        return not self._unopened and self.expected.keys() == self.ended | self.given_up

    def act(self) -> None:
        """Open, send, give up, change settings: one of them."""
        for stream_id in self.expected.keys() - self.ended - self.given_up:
            # The library grants nothing by itself where its own settings have made a window negative.
            if (window := self.h2.remote_flow_control_window(stream_id)) < 0:
                self.h2.increment_flow_control_window(1 - window, stream_id)
        chance = self.rng.random()
        if self._unopened and chance < 0.3:
            self._open(self._unopened.pop())
        elif chance > 0.99 and self.sending and not self._is_patient:
            stream_id = self.rng.choice(sorted(self.sending))
            self.h2.reset_stream(stream_id)
            self.given_up.add(stream_id)
            del self.sending[stream_id]
        elif chance > 0.96:
            self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: self.rng.randrange(1, 100_000)})
        elif chance > 0.94:
            self.h2.ping(b"12345678")
        elif self.sending:
            self._send(self.rng.choice(sorted(self.sending)))

    def receive(self, data: bytes) -> None:
        """Take what the server sent."""
        for event in self.h2.receive_data(data):
            if isinstance(event, DataReceived):
                self.received[event.stream_id] += event.data
                if event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, (ResponseReceived, TrailersReceived)):
                self.status[event.stream_id] = dict(event.headers).get(b"grpc-status", b"")
            elif isinstance(event, StreamEnded):
                self.ended.add(event.stream_id)
                self.sending.pop(event.stream_id, None)
            elif isinstance(event, StreamReset):
                assert event.error_code == 0, event

    def _open(self, messages: list[bytes]) -> None:
        stream_id = self.h2.get_next_available_stream_id()
        more = [(b"traceparent", b"%032x" % self.rng.getrandbits(128))] if self.rng.random() < 0.5 else []
        self.h2.send_headers(stream_id, [*CALL_FIELDS, *more])
        self.sending[stream_id] = self.expected[stream_id] = framed(*messages)
        self.received[stream_id] = b""

    def _send(self, stream_id: int) -> None:
        left = self.sending[stream_id]
        window = min(self.h2.local_flow_control_window(stream_id), 16_384)
        padding = self.rng.choice([None, None, None, 0, 7, 255])
        room = window - (0 if padding is None else padding + 1)
        size = min(len(left), max(0, room), self.rng.choice([1, 5, 100, 16_384]))
        if room < 0 or (left and not size):
            return
        is_last = size == len(left)
        self.h2.send_data(stream_id, left[:size], end_stream=is_last, pad_length=padding)
        self.sending[stream_id] = left[size:]
        if is_last:
            del self.sending[stream_id]


def with_continuations(rng: random.Random, data: bytes) -> bytes:
    """The same frames, header blocks cut into several."""
    at = len(frames.PREFACE) if data.startswith(frames.PREFACE) else 0
    out = [data[:at]]
    for kind, flags, stream_id, payload in parsed(data[at:]):
        if kind != frames.HEADERS or rng.random() < 0.5:
            out.append(frames.frame(kind, flags, stream_id, payload))
            continue
        cut = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.randrange(4)))
        parts = [payload[a:b] for a, b in zip([0, *cut], [*cut, len(payload)], strict=True)]
        for number, part in enumerate(parts):
            flag = frames.END_HEADERS if number == len(parts) - 1 else 0
            if number:
                out.append(frames.frame(frames.CONTINUATION, flag, stream_id, part))
            else:
                out.append(frames.frame(kind, flags & ~frames.END_HEADERS | flag, stream_id, part))
    return b"".join(out)


def pieces(rng: random.Random, data: bytes, size: int) -> Iterator[bytes]:
    """Cut anywhere."""
    at = 0
    while at < len(data):
        step = rng.randrange(1, size + 1)
        yield data[at : at + step]
        at += step


def play(
    seed: int, window: int, cut: int, messages: list[list[bytes]], *, is_patient: bool = False
) -> tuple[Client, Served]:
    """All calls to their ends."""
    rng = random.Random(seed)
    client, served = Client(rng, window, messages, is_patient=is_patient), Served(is_greeted=False)
    for turn in range(MAX_TURNS):
        if client.is_done:
            return client, served
        client.act()
        # What the library holds is whole frames; the network cuts them.
        for piece in pieces(rng, with_continuations(rng, client.h2.data_to_send()), cut):
            served.connection.receive(piece, turn * TURN_S)
        for piece in pieces(rng, b"".join(iter(served.connection.take, b"")), cut):
            client.receive(piece)
    raise AssertionError("the calls do not end")


SIZES = st.one_of(st.integers(0, 50), st.integers(0, 40_000), st.just(70_000))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 1 << 32),
    st.sampled_from([1, 100, 16_384, 65_535, 1 << 20]),
    st.sampled_from([7, 1_000, 65_536]),
    st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=5),
    st.booleans(),
)
def test_all_that_is_sent_is_echoed(
    seed: int, window: int, cut: int, sizes: list[list[int]], is_patient: bool
) -> None:
    """Each call gets its messages back and OK; the client finds no fault, and neither do we."""
    if window == 1:
        sizes = [[size % 50 for size in call] for call in sizes]
    messages = [
        [struct.pack(">I", number) * (size // 4) for number, size in enumerate(call)] for call in sizes
    ]
    client, served = play(seed, window, cut, messages, is_patient=is_patient)
    for stream_id in client.ended - client.given_up:
        assert client.received[stream_id] == client.expected[stream_id]
        assert client.status[stream_id] == b"0"
    assert served.faults == []
    assert served.bugs == []
    assert served.connection.outbox.unsent_bytes == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_messages_together(seed: int) -> None:
    """Four calls, each of the largest message, share room for two."""
    client, served = play(
        seed, 1 << 20, 65_536, [[b"m" * MAX_MESSAGE_BYTES] for _ in range(4)], is_patient=True
    )
    assert len(client.ended) == 4
    assert client.received == client.expected
    assert served.faults == []
