"""Traces: formats, ids, ticks, sessions, limits, generators and the shipped sample."""

from __future__ import annotations

import gzip
import lzma
from codecs import BOM_UTF8
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from tokenway.simulator.replay import readers
from tokenway.simulator.replay.export import records
from tokenway.simulator.replay.generators import GENERATORS, with_sharing
from tokenway.simulator.replay.readers import Format, TraceError, read_trace
from tokenway.simulator.replay.samples.make import content
from tokenway.simulator.replay.sources import SAMPLE_FILE, open_trace
from tokenway.simulator.replay.trace import (
    Timing,
    Trace,
    TraceRequest,
    arrivals,
    beyond,
    block_ratio,
    cut,
    engine_keys,
    limited,
    runs_of,
    shared_blocks,
)


def _write(path: Path, lines: Iterable[Any]) -> Path:
    data = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    match path.suffix:
        case ".gz":
            data = gzip.compress(data)
        case ".xz":
            data = lzma.compress(data)
    path.write_bytes(data)
    return path


def _mooncake(timestamp: int, prompt: int, output: int, ids: list[int]) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}


def test_mooncake_ids_are_shared_prefixes_of_the_prompt_alone(tmp_path: Path) -> None:
    """Two prompts with equal leading ids have equal leading keys; what is generated has none."""
    path = _write(
        tmp_path / "t.jsonl.gz", [_mooncake(0, 1100, 600, [0, 1, 2]), _mooncake(3000, 1030, 5, [0, 1, 9])]
    )
    trace = read_trace(path)
    assert (trace.timing, trace.block_tokens) == (Timing.TICKS, 512)
    one, other = (engine_keys(request, 512, 16) for request in trace.requests)
    assert len(one) == 1100 // 16
    assert one[:64] == other[:64] == list(range(64))
    assert not set(one[64:]) & set(other[64:])


def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path: Path) -> None:
    """Windows shells write files with one; a line of JSON was taken for the header of a table."""
    path = _write(tmp_path / "t.jsonl", [_mooncake(0, 600, 5, [1, 2])])
    plain = read_trace(path)
    path.write_bytes(BOM_UTF8 + path.read_bytes())
    assert read_trace(path) == plain


def test_coarse_timestamps_are_spread_inside_their_ticks(tmp_path: Path) -> None:
    """Arrivals stay in their tick, differ, and the speed divides them all."""
    lines = [_mooncake(tick, 10, 1, []) for tick in (9000, 9000, 9000, 12000, 12000, 15000)]
    trace = read_trace(_write(tmp_path / "t.jsonl", lines))
    at = arrivals(trace, Random(1), 1.0)
    assert [int(time_s // 3) for time_s in at] == [0, 0, 0, 1, 1, 2]
    assert len(set(at)) == 6
    assert arrivals(trace, Random(1), 2.0) == [time_s / 2 for time_s in at]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[1]",
        b'{"timestamp": 0, "input_length": "7", "output_length": 1, "hash_ids": []}',
        b'{"timestamp": 0, "input_length": -7, "output_length": 1, "hash_ids": []}',
        b'{"timestamp": true, "input_length": 7, "output_length": 1, "hash_ids": []}',
        b'{"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": [-1]}',
        b'{"timestamp": 0, "input_length": 7, "output_length": 1}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    """The error says which file and line."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(orjson.dumps(_mooncake(0, 10, 1, [])) + b"\n" + line + b"\n")
    with pytest.raises(TraceError, match=r"t\.jsonl:2: "):
        read_trace(path)


def test_empty_and_truncated_files_are_errors(tmp_path: Path) -> None:
    """Neither is taken for a trace."""
    (tmp_path / "e.jsonl").write_bytes(b"")
    with pytest.raises(TraceError, match="empty"):
        read_trace(tmp_path / "e.jsonl")
    whole = gzip.compress(b"".join(orjson.dumps(_mooncake(0, 10, 1, [i])) + b"\n" for i in range(500)))
    (tmp_path / "t.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="decompressing"):
        read_trace(tmp_path / "t.jsonl.gz")


def _session(name: str, requests: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": name, "models": ["m"], "block_size": 64, "tool_tokens": 128, "requests": requests}


def _turn(t: float, prompt: int, output: int, runs: list[list[int]], think: float) -> dict[str, Any]:
    return {
        "t": t, "type": "n", "in": prompt, "out": output,
        "hash_ids": runs, "think_time": think, "api_time": 1.0,
    }  # fmt: skip


def test_sessions_are_closed_loops_with_ids_of_their_own(tmp_path: Path) -> None:
    """Turns wait for each other, sub-agents for the turn before; only equal tool definitions are shared."""
    agent = {
        "type": "subagent", "t": 7.0, "models": ["small"], "tool_tokens": 0,
        "requests": [_turn(0.0, 64, 5, [[900, 1]], 0.0), _turn(2.0, 128, 5, [[900, 2]], 1.5)],
    }  # fmt: skip
    turns = [_turn(0.0, 256, 70, [[1, 4]], 0.0), agent, _turn(9.0, 450, 3, [[1, 7]], 12.0)]
    path = _write(tmp_path / "s.jsonl.xz", [_session("a", turns), _session("b", turns)])
    trace = read_trace(path)
    assert trace.timing is Timing.SESSIONS
    assert [(r.session, r.after, r.think_s) for r in trace.requests[:4]] == [
        ("a", None, 0.0),
        ("a", 0, 6.0),  # 7 s after the start of a session whose first answer took 1 s
        ("a", 1, 1.5),
        ("a", 0, 12.0),
    ]
    assert trace.requests[4].after is None
    first, second = (set(engine_keys(trace.requests[i], 64, 64)) for i in (0, 4))
    assert len(first & second) == 2  # 128 tokens of tools


def test_an_answer_is_found_again_where_the_next_turn_holds_it(tmp_path: Path) -> None:
    """Ids of the next turn beyond this one's prompt are what this one generates."""
    turns = [_turn(0.0, 256, 70, [[1, 4]], 0.0), _turn(9.0, 450, 3, [[1, 7]], 1.0)]
    trace = read_trace(_write(tmp_path / "s.jsonl", [_session("a", turns)]))
    first, second = (engine_keys(request, 64, 16) for request in trace.requests)
    assert len(first) == 320 // 16
    assert first == second[:20]


def test_a_compacted_turn_does_not_take_the_answer(tmp_path: Path) -> None:
    """Where the next turn begins otherwise, what was generated stays private."""
    turns = [_turn(0.0, 256, 70, [[1, 4]], 0.0), _turn(9.0, 450, 3, [[1, 3], [50, 4]], 1.0)]
    trace = read_trace(_write(tmp_path / "s.jsonl", [_session("a", turns)]))
    assert len(engine_keys(trace.requests[0], 64, 16)) == 256 // 16


def test_sessions_begin_at_random_and_faster_with_speed() -> None:
    """Starts are a Poisson process whose rate the speed multiplies; within a session nothing changes."""
    requests = tuple(TraceRequest(0.0, 1, 1, session=str(i)) for i in range(2000))
    trace = Trace("t", 64, requests, Timing.SESSIONS, sessions_per_s=2.0)
    slow, fast = (arrivals(trace, Random(0), speed)[-1] for speed in (1.0, 4.0))
    assert slow == pytest.approx(1000.0, rel=0.1)
    assert fast == pytest.approx(slow / 4)


def test_a_csv_has_times_and_lengths(tmp_path: Path) -> None:
    """Times count from the first line; nothing is shared."""
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9305900,396,109\n"
    )
    trace = read_trace(path)
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [
        (0.0, 374, 44),
        (pytest.approx(4.25, abs=1e-5), 396, 109),
    ]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n")
    with pytest.raises(TraceError, match=r"a\.csv:2"):
        read_trace(path)
    path.write_text("when,how\n")
    with pytest.raises(TraceError, match=r"a\.csv:1"):
        read_trace(path)


def test_own_logs_keep_hashes_sessions_and_limits(tmp_path: Path) -> None:
    """Equal hashes share; limits come in milliseconds."""
    common = {"completion_tokens": 3, "prompt_tokens": 300}
    path = _write(
        tmp_path / "own.jsonl",
        [
            {"time_s": 100.0, "blocks": [2**63 + 5, 7], "session": "x", **common},
            {"time_s": 101.5, "blocks": [2**63 + 5, 8], "slo_ttft_ms": 500, **common},
        ],
    )
    trace = read_trace(path)
    one, two = trace.requests
    assert shared_blocks(one.runs, two.runs) == 1
    assert (two.arrival_s, one.session, two.slo_ttft_s, two.slo_tpot_s) == (1.5, "x", 0.5, None)


def test_the_format_can_be_forced(tmp_path: Path) -> None:
    """A file read as what it is not fails by its first line."""
    path = _write(tmp_path / "t.jsonl", [_mooncake(0, 10, 1, [])])
    with pytest.raises(TraceError, match=r"t\.jsonl:1"):
        read_trace(path, Format.SESSIONS)


def test_too_long_requests_are_dropped_and_their_followers_wait_on() -> None:
    """What waited for a dropped request waits for the one before it, as long as both would have thought."""
    requests = (
        TraceRequest(1.0, 10, 1, session="a"),
        TraceRequest(0.0, 99, 1, session="a", after=0, think_s=2.0),
        TraceRequest(0.0, 10, 1, session="a", after=1, think_s=3.0),
        TraceRequest(4.0, 99, 1, session="b"),
        TraceRequest(0.0, 10, 1, session="b", after=3, think_s=5.0),
    )
    trace = limited(Trace("t", 64, requests), max_context_tokens=50)
    assert trace.dropped == 2
    assert [(r.after, r.think_s, r.arrival_s) for r in trace.requests] == [
        (None, 0.0, 1.0),
        (0, 5.0, 0.0),
        (None, 0.0, 9.0),
    ]
    assert len(limited(trace, max_requests=1).requests) == 1


def test_runs_are_cut_and_compared_as_the_ids_they_stand_for() -> None:
    """Run algebra equals that of plain lists."""
    rng = Random(3)
    for _ in range(200):
        ids = [int(rng.random() * 6) for _ in range(int(rng.random() * 8))]
        other = ids[: int(rng.random() * 8)] + [int(rng.random() * 6) for _ in range(3)]
        flat = [[i for first, count in runs_of(x) for i in range(first, first + count)] for x in (ids, other)]
        assert flat == [ids, other]
        at = int(rng.random() * 9)
        expand = [
            [i for first, count in part for i in range(first, first + count)]
            for part in (cut(runs_of(ids), at), beyond(runs_of(ids), at))
        ]
        assert expand == [ids[:at], ids[at:]]
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(map(len, flat))
        )
        assert shared_blocks(runs_of(ids), runs_of(other)) == same


def test_router_blocks_are_the_largest_that_divide_an_id() -> None:
    """512 tokens in blocks of 16: up to 128 tokens are eight engine blocks; 64 allow no more than four."""
    assert block_ratio(Trace("t", 512, ()), 16, 128) == 8
    assert block_ratio(Trace("t", 64, ()), 16, 128) == 4
    assert block_ratio(Trace("t", 48, ()), 16, 40) == 1
    with pytest.raises(ValueError, match="multiples"):
        block_ratio(Trace("t", 100, ()), 16, 128)


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_generators_repeat_themselves_by_seed(name: str) -> None:
    """Equal seeds make equal traces, others differ; every id has one position."""
    make = GENERATORS[name]
    trace = make(Random(1), 200)
    assert trace == make(Random(1), 200)
    assert trace != make(Random(2), 200)
    assert len(trace.requests) == 200
    position: dict[int, int] = {}
    for index, request in enumerate(trace.requests):
        assert request.after is None or request.after < index
        for at, key in enumerate(engine_keys(request, 64, 64)):
            assert position.setdefault(key, at) == at


def test_a_hot_spot_is_hot_in_the_middle() -> None:
    """One prefix has six in ten there, and its share elsewhere."""
    trace = GENERATORS["hot-spot"](Random(0), 900)
    first_ids = [request.runs[0][0] for request in trace.requests]
    hot = max(set(first_ids), key=first_ids.count)
    assert first_ids[300:600].count(hot) / 300 == pytest.approx(0.6, abs=0.1)
    assert first_ids[:300].count(hot) < 30


def test_made_up_sharing_keeps_times_and_lengths() -> None:
    """About half of the requests continue a conversation, and no request changes its size."""
    rng = Random(5)
    bare = Trace(
        "t", 128, tuple(TraceRequest(i * 1.0, 200 + int(rng.random() * 4000), 50) for i in range(400))
    )
    trace = with_sharing(bare, Random(1))
    assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == [
        (r.arrival_s, r.prompt_tokens, r.output_tokens) for r in bare.requests
    ]
    assert len({r.session for r in trace.requests}) == pytest.approx(230, abs=60)
    assert all(r.after is None for r in trace.requests)


def test_the_shipped_sample_is_what_its_generator_makes() -> None:
    """It can be read, and made again byte for byte."""
    trace = open_trace("sample", 0)
    assert len(trace.requests) == 300
    path = Path(__file__).parents[2] / "tokenway" / "simulator" / "replay" / "samples" / SAMPLE_FILE
    assert gzip.decompress(path.read_bytes()) == content()
    assert path.stat().st_size < 16_384


def test_written_records_read_back_as_the_same_trace(tmp_path: Path) -> None:
    """Times, lengths and shared beginnings survive the export."""
    trace = GENERATORS["shared-prefix"](Random(0), 50)
    back = read_trace(_write(tmp_path / "x.jsonl", records(trace, 64)))
    for one, other in zip(trace.requests, back.requests, strict=True):
        assert one.arrival_s == pytest.approx(other.arrival_s, abs=1e-3)
        assert one.prompt_tokens == other.prompt_tokens
        assert shared_blocks(back.requests[0].runs, other.runs) == shared_blocks(
            cut(trace.requests[0].runs, trace.requests[0].prompt_tokens // 64),
            cut(one.runs, one.prompt_tokens // 64),
        )


@pytest.mark.parametrize("name", ["gen:nothing", "gen:hot-spot:rps=2", "gen:hot-spot:requests=0"])
def test_unknown_generators_are_refused(name: str) -> None:
    """A wrong name or parameter is an error, not a default."""
    with pytest.raises(ValueError, match="generator"):
        open_trace(name, 0)


def test_sharing_is_not_made_up_where_a_trace_shows_it() -> None:
    """Ids of a source are never overwritten."""
    with pytest.raises(ValueError, match="says itself"):
        open_trace("sample", 0, share=True)


REQUEST = b'{"time_s": 1, "prompt_tokens": 256, "completion_tokens": 1, "blocks": [1, 3]}\n'


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.xz", "csv"])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_without_end_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, end: bytes
) -> None:
    """A compressed line can be two thousand times its file: it is named, and the rest never decompressed."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    path = tmp_path / f"trace.{ending}"
    content = REQUEST + b"0" * 1001 + end + REQUEST
    packed = {".gz": gzip.compress(content), ".xz": lzma.compress(content)}
    path.write_bytes(packed.get(path.suffix, content))
    with pytest.raises(TraceError, match=r"trace\.\S+:2: the line is longer than 1000 bytes"):
        read_trace(path, Format.REQUESTS)


def test_a_line_of_the_longest_length_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound counts the line's end."""
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", len(REQUEST))
    path = tmp_path / "trace.jsonl"
    path.write_bytes(REQUEST * 2)
    assert len(read_trace(path).requests) == 2


@pytest.mark.parametrize("content", [REQUEST * 100, b"\n" * 8000])
def test_a_file_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Short lines in any number, empty ones too."""
    monkeypatch.setattr(readers, "MAX_FILE_BYTES", 4000)
    path = tmp_path / "trace.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(content)
    with pytest.raises(TraceError, match="the file has more than 4000 bytes"):
        read_trace(path)


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (Format.MOONCAKE, '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, 3]}'),
        (Format.REQUESTS, '{"time_s": 1, "prompt_tokens": 1, "completion_tokens": 1}'),
        (Format.SESSIONS, '{"block_size": 1, "requests": [{"in": 1, "out": 1, "hash_ids": [[1, 1]]}]}'),
        (Format.CSV, "2024-01-01 00:00:00, 1, 1"),
    ],
)
def test_what_memory_does_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format, line: str
) -> None:
    """Requests and what they hold are counted in every format."""
    monkeypatch.setattr(readers, "MAX_PIECES", 40)
    path = tmp_path / "trace"
    header = "TIMESTAMP, ContextTokens, GeneratedTokens\n" if form is Format.CSV else ""
    path.write_text(header + f"{line}\n" * 10)
    assert len(read_trace(path, form).requests) == 10
    path.write_text(header + f"{line}\n" * 60)
    with pytest.raises(TraceError, match="the trace has more than 40 requests and runs"):
        read_trace(path, form)
