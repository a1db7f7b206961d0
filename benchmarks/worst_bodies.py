"""The bodies that cost most for their bytes: found by search, and how long each makes everybody else wait.

    python -m benchmarks.worst_bodies             # the known shapes; make bench-worst-bodies
    python -m benchmarks.worst_bodies --seconds 60    # looks for worse ones; make fuzz-bodies

Three figures per shape: processor time and memory per byte of body, read in process; and the longest
stand-still of a gateway's event loop while such a body is decided by it, sent over a real gRPC stream by
another process, at the largest size that is still read on the loop, at 2 MiB and at the largest that is
allowed: by the clock, and in processor time of the loop alone, which other processes do not lengthen. A shape
is an API, a place in its body, and a piece of JSON that fills it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from prometheus_client import CollectorRegistry

from extproc.discovery.fleet import Fleet
from extproc.discovery.listed import Listed
from extproc.errors import RouterError
from extproc.health.settings import HealthSettings
from extproc.health.tracker import HealthTracker
from extproc.observing.ignored_headers import IgnoredHeaders
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.protocol import wire
from extproc.protocol.bootstrap_dialect import BootstrapDialect
from extproc.protocol.servicer import Processor
from extproc.request.blocks import block_hashes
from extproc.request.reading import ReadOrder, read_body
from extproc.request.rules import ModelRules, Rule, RuleTable
from extproc.request.structure import is_heavy
from extproc.routing.caches import Caches
from extproc.routing.gateway import Gateway
from extproc.routing.homes import Homes
from extproc.routing.listeners import endings_of
from extproc.routing.router import Router
from extproc.routing.settings import RouterSettings
from extproc.routing.state import Outside, make_routing_state
from extproc.routing.table import RoutingTable
from extproc.server.bodies.body_readers import BodyReaders
from extproc.transport import grpc_aio
from extproc.values.headers import REQUEST_ID_HEADER
from metadata_center.addresses import Address
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.load.counters import Counters
from metadata_center.load.table import LoadTable
from tokenway.cli.serve import GC_THRESHOLDS

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, EMBEDDINGS = "/v1/messages", "/v1/embeddings"

_HI = b'"messages":[{"role":"user","content":"a"}]'

PLACES: Final[dict[str, tuple[str, bytes, bytes]]] = {
    "chat.messages": (CHAT, b'"messages":[', b"]"),
    "chat.content": (CHAT, b'"messages":[{"role":"user","content":[', b"]}]"),
    "chat.tool": (CHAT, b'"messages":[{"role":"tool","content":[', b"]}]"),
    "chat.calls": (CHAT, b'"messages":[{"role":"assistant","tool_calls":[', b"]}]"),
    "chat.tools": (CHAT, _HI + b',"tools":[', b"]"),
    "chat.documents": (CHAT, _HI + b',"documents":[', b"]"),
    "chat.ignored": (CHAT, _HI + b',"metadata":[', b"]"),
    "messages.messages": (MESSAGES, b'"messages":[', b"]"),
    "messages.content": (MESSAGES, b'"messages":[{"role":"user","content":[', b"]}]"),
    "messages.result": (
        MESSAGES,
        b'"messages":[{"role":"user","content":[{"type":"tool_result","content":[',
        b"]}]}]",
    ),
    "messages.system": (MESSAGES, _HI + b',"system":[', b"]"),
    "messages.tools": (MESSAGES, _HI + b',"tools":[', b"]"),
    "responses.input": (RESPONSES, b'"input":[', b"]"),
    "responses.content": (RESPONSES, b'"input":[{"role":"user","content":[', b"]}]"),
    "responses.output": (RESPONSES, b'"input":[{"type":"function_call_output","output":[', b"]}]"),
    "responses.tools": (RESPONSES, b'"input":"a","tools":[', b"]"),
    "completions.prompt": (TEXT, b'"prompt":[', b"]"),
    "embeddings.input": (EMBEDDINGS, b'"input":[', b"]"),
    "embeddings.messages": (EMBEDDINGS, b'"messages":[', b"]"),
    "rerank.documents": ("/rerank", b'"query":"a","documents":[', b"]"),
    "score.items": ("/score", b'"query":[{"content":"a"}],"items":[', b"]"),
    "classify.input": ("/classify", b'"input":[', b"]"),
    "pooling.data": ("/pooling", b'"data":[', b"]"),
    "tokenize.messages": ("/tokenize", b'"messages":[', b"]"),
    "count_tokens.messages": ("/v1/messages/count_tokens", b'"messages":[', b"]"),
}
"""Where a body may be filled: path, and what is before and behind the filling."""

PIECES: Final = (
    *(b"1", b"123456", b"1e9", b"-1.5", b"true", b'""', b'"a"', '"é"'.encode(), '"日本"'.encode()),
    *(b"[]", b"{}", b"[1]", b"[[]]", b"[[[[[[[[]]]]]]]]", b'{"a":1}', b'{"a":{}}', b'{"a":1,"b":2,"c":3}'),
    *(b'"' + escape * 1000 + b'"' for escape in (b"\\n", b"\\u0001", b"\\u4e2d", b'\\"', b"\\\\")),
    *(b'"' + b"lorem ipsum, [x] {y} " * 50 + b'"', b'"' + b"A" * 2000 + b'"'),
    *(
        b'{"audio_url":""}',
        b'{"image_url":{"url":""}}',
        b'{"video_url":"data:"}',
        b'{"file":{"file_data":""}}',
    ),
    *(b'{"source":{"data":""}}', b'{"input_audio":{"data":"x"}}', b'{"file_id":"x"}', b'{"image_embeds":""}'),
    *(b'{"type":"text","text":""}', b'{"type":"text","text":"a","cache_control":{}}', b'{"text":"a","a":1}'),
    *(b'{"content":[]}', b'{"content":[{"content":[]}]}', b'{"content":[{}]}', b'{"content":""}'),
    *(
        b'{"role":""}',
        b'{"role":"user"}',
        b'{"role":"system","content":[""]}',
        b'{"role":"tool","content":["a","b"]}',
    ),
    *(
        b'{"role":"assistant","tool_calls":[{"function":{}}]}',
        b'{"function":{}}',
        b'{"function":{"name":""}}',
    ),
    b'{"id":"","type":"function","function":{"name":"","arguments":"{\\"a\\":[[],[],[]]}"}}',
    b'{"role":"assistant","tool_calls":[{"function":{"arguments":"{}"}}]}',
    b'{"role":"system","content":"x-anthropic-billing-header\\na"}',
    b'{"type":"text","text":"x-anthropic-billing-header\\n"}',
    *(b'{"type":"function_call","arguments":"{\\"a\\":1.5}"}', b'{"type":"reasoning","summary":[]}'),
    *(b'{"output":[[]]}', b'{"output":[{"image_url":""}]}', b'{"name":"","input_schema":{}}'),
)
"""What to fill it with, again and again."""

MIB: Final = 1024 * 1024
READ_BYTES: Final = 256 * 1024
MAX_BODY_BYTES: Final = RouterSettings().max_body_bytes
_TOP: Final = 12


@dataclass(frozen=True, slots=True)
class Shape:
    """A place and the pieces that fill it in turn."""

    place: str
    pieces: tuple[bytes, ...]

    def body(self, num_bytes: int) -> tuple[str, bytes]:
        """Path and body of at most so many bytes, with a field that has to be taken out."""
        path, before, after = PLACES[self.place]
        head = b'{"model":"m","stream":true,"priority":1,' + before
        unit = b",".join(self.pieces)
        number = max(1, (num_bytes - len(head) - len(after)) // (len(unit) + 1))
        return path, b"%b%b%b}" % (head, b",".join([unit] * number), after)

    def __str__(self) -> str:
        """Short enough for a table."""
        unit = ",".join(piece.decode() for piece in self.pieces)
        return f"{self.place:<20} {unit if len(unit) <= 70 else unit[:67] + '...'}"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one body, read in process.

    Attributes:
        ns_per_byte: Processor time.
        memory_per_byte: Most bytes held at once.
    """

    ns_per_byte: float
    memory_per_byte: float


def cost_of(shape: Shape, num_bytes: int = READ_BYTES) -> Cost:
    """Read one body of about that size, hash it and write it again."""
    path, body = shape.body(num_bytes)
    order = ReadOrder(path, frozenset(), True, frozenset(), 4 * MIB)

    def read() -> None:
        try:
            found = read_body(order, body)
        except RouterError:
            return
        block_hashes(found.request.prompt, 1, widths=found.request.widths)

    took = []
    gc.collect()
    gc.disable()  # as in the processes that read large bodies; the gateway itself collects seldom
    for _ in range(2):
        began = time.process_time()
        read()
        took.append(time.process_time() - began)
    gc.enable()
    tracemalloc.start()
    read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Cost(min(took) * 1e9 / len(body), peak / len(body))


def shapes() -> Iterator[Shape]:
    """Every piece in every place."""
    for place in PLACES:
        for piece in PIECES:
            yield Shape(place, (piece,))


def mutated(shape: Shape, rng: random.Random) -> Shape:
    """A shape like it: another place, a piece more, fewer or replaced, or one piece inside another."""
    pieces = list(shape.pieces)
    match rng.randrange(5):
        case 0:
            return replace(shape, place=rng.choice(tuple(PLACES)))
        case 1:
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(PIECES))
        case 2:
            pieces[rng.randrange(len(pieces))] = rng.choice(PIECES)
        case 3:
            at = rng.randrange(len(pieces))
            for empty in (b"[]", b"{}", b'""'):
                if empty in pieces[at]:
                    pieces[at] = pieces[at].replace(
                        empty, rng.choice((b"[%b]", b'{"a":%b}')) % rng.choice(PIECES), 1
                    )
                    break
        case _:
            if len(pieces) > 1:
                del pieces[rng.randrange(len(pieces))]
    return Shape(shape.place, tuple(pieces[:6]))


def search(seconds: float, seed: int) -> dict[Shape, Cost]:
    """The known shapes, then those that come of changing the worst, for so long."""
    found = {shape: cost_of(shape, 64 * 1024) for shape in shapes()}
    rng = random.Random(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        worst = by_time(found)[:_TOP] + by_memory(found)[:_TOP]
        shape = mutated(rng.choice(worst), rng)
        if shape not in found:
            found[shape] = cost_of(shape, 64 * 1024)
    return found


def by_time(found: dict[Shape, Cost]) -> list[Shape]:
    """Worst first."""
    return sorted(found, key=lambda shape: -found[shape].ns_per_byte)


def by_memory(found: dict[Shape, Cost]) -> list[Shape]:
    """Worst first."""
    return sorted(found, key=lambda shape: -found[shape].memory_per_byte)


def largest_on_the_loop(shape: Shape) -> int:
    """The size up to which bodies of a shape are read on the loop."""
    low, high = 1024, 2 * MIB + 1
    while high - low > 4096:
        middle = (low + high) // 2
        low, high = (low, middle) if is_heavy(shape.body(middle)[1]) else (middle, high)
    return low


class StallMeter:
    """How long the event loop stood still at most, since it was last asked."""

    def __init__(self) -> None:
        self.longest_s = self.busiest_s = 0.0
        self._task = asyncio.get_running_loop().create_task(self._beat())

    async def _beat(self) -> None:
        before, busy = time.monotonic(), time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now, worked = time.monotonic(), time.thread_time()
            self.longest_s = max(self.longest_s, now - before - 0.001)
            self.busiest_s = max(self.busiest_s, worked - busy)
            before, busy = now, worked

    def take(self) -> tuple[float, float]:
        """Seconds by the clock and of the processor; and begin again."""
        longest = self.longest_s, self.busiest_s
        self.longest_s = self.busiest_s = 0.0
        return longest

    def stop(self) -> None:
        """No more."""
        self._task.cancel()


def gateway(readers: BodyReaders) -> Gateway:
    """A worker's request path over three endpoints."""
    fleet = Fleet()
    places = [Address(f"10.0.0.{i}", 8000) for i in range(3)]
    fleet.replace("bench", {"c": [Listed(str(place), place) for place in places]})
    health = HealthTracker(HealthSettings())
    health.update({key: fleet.of(key) for key in fleet.keys})
    metrics = Metrics(CollectorRegistry(), "bench")
    metrics.configure(models=["m"], clusters=["c"], endpoints=fleet.keys)
    caches, load = Caches(PrefixIndex(100_000, 100_000)), LoadTable(Counters())
    state = make_routing_state(load, caches, health, RecordRing(200), metrics, Homes(), Outside())
    table = RoutingTable(
        RuleTable([ModelRules("m", (Rule("c"),))]),
        fleet.clusters,
        ["m"],
        None,
        frozenset(),
        load.slots,
        0.0,
    )
    router = Router(
        state.scheduling,
        table,
        RouterSettings(usage_injection=True),
        random.Random(1),
        time.monotonic,
        time.time,
        loop=asyncio.get_running_loop,
        readers=readers,
    )
    endings = endings_of(state.ending, fleet, [], raise_it)
    return Gateway(
        router,
        state.first_tokens,
        state.ending.stored,
        endings,
        metrics,
        router.decide,
        time.monotonic,
        time.time,
        IgnoredHeaders(metrics, time.monotonic).report,
    )


def raise_it(error: Exception) -> None:
    """No listener fails here."""
    raise error


async def stalls(sent: list[tuple[Shape, int]]) -> list[tuple[float, float, float, int]]:
    """Per body: the longest stand-still and work at a stretch, the time to its answer, and its bytes."""
    readers = BodyReaders()
    made = gateway(readers)
    processor = Processor(made.judge, made, BootstrapDialect("0.bench"), lambda: False)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{Path(folder) / 'gw.sock'}"
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_BODY_BYTES + MIB)])
        server.add_generic_rpc_handlers(grpc_aio.handlers([processor.rpc]))
        server.add_insecure_port(address)
        await server.start()
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.worst_bodies", "--client", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=MIB,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        meter = StallMeter()
        for shape, num_bytes in [(Shape("completions.prompt", (b'"a"',)), 1000), *sent]:
            pieces = [piece.decode() for piece in shape.pieces]
            client.stdin.write(json.dumps([shape.place, pieces, num_bytes]).encode() + b"\n")
            assert await client.stdout.readline() == b"made\n"
            meter.take()
            client.stdin.write(b"\n")
            took_s, length = json.loads(await client.stdout.readline())
            await asyncio.sleep(0.01)
            measured.append((*meter.take(), took_s, length))
        client.stdin.close()
        await client.wait()
        meter.stop()
        await server.stop(None)
    await readers.close()
    return measured[1:]


def send_all(address: str) -> None:
    """The other process: makes bodies, sends each on request, says how long the answer took."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        process: Any = channel.stream_stream(
            wire.PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=lambda raw: raw,
        )
        for number, line in enumerate(sys.stdin):
            place, pieces, num_bytes = json.loads(line)
            path, body = Shape(place, tuple(piece.encode() for piece in pieces)).body(num_bytes)
            headers = pb.ProcessingRequest()
            for name, said in ((":method", "POST"), (":path", path), (REQUEST_ID_HEADER, str(number))):
                headers.request_headers.headers.headers.add(key=name, raw_value=said.encode())
            message = pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=True))
            print("made", flush=True)
            sys.stdin.readline()
            began = time.monotonic()
            for _ in process(iter((headers, message))):
                pass
            print(json.dumps([time.monotonic() - began, len(body)]), flush=True)


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.0, help="look for worse shapes for so long")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        send_all(options.client)
        return
    seed = random.randrange(2**32) if options.seed is None else options.seed
    found = search(options.seconds, seed)
    slow, large = by_time(found)[:_TOP], by_memory(found)[:_TOP]
    print(f"{len(found)} shapes, seed {seed}; in process, per byte of body:")
    for shape in dict.fromkeys((*slow, *large)):
        print(f"{found[shape].ns_per_byte:7.0f} ns {found[shape].memory_per_byte:6.1f} B  {shape}")
    text = Shape("chat.content", (b'"' + b"lorem ipsum " * 100 + b'"',))
    sent = [
        (shape, size)
        for shape in dict.fromkeys((*slow, *large, text))
        for size in (largest_on_the_loop(shape), 2 * MIB, MAX_BODY_BYTES - 100)
    ]
    measured = asyncio.run(stalls(sent))
    print("the event loop's longest stand-still, over gRPC:")
    for (shape, _), (stall_s, busy_s, took_s, length) in zip(sent, measured, strict=True):
        print(
            f"{stall_s * 1e3:6.1f} ms, {busy_s * 1e3:6.1f} ms of work, answered in {took_s * 1e3:6.1f} ms, "
            f"{length / MIB:5.2f} MiB  {shape}"
        )
    figures = {
        "worst_ns_per_byte": round(found[slow[0]].ns_per_byte),
        "worst_memory_per_byte": round(found[large[0]].memory_per_byte, 1),
        "worst_stall_ms": round(max(stall_s for stall_s, *_ in measured) * 1e3, 1),
        "worst_work_ms": round(max(busy_s for _, busy_s, *_ in measured) * 1e3, 1),
        "longest_answer_ms": round(max(took_s for *_, took_s, _ in measured) * 1e3),
        "shapes": len(found),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
