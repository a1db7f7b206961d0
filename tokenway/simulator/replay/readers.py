"""Trace files: each format becomes a `Trace`, and a bad line an error that names it.

Formats (`.gz` and `.xz` are decompressed):
    mooncake: JSON lines `{timestamp (ms), input_length, output_length, hash_ids}`; ids of 512 tokens,
        chained, for the prompt alone. What was generated is cached by the engine and never found again.
    sessions: one JSON object a line and session, `{id, block_size, requests: [...]}`, its requests
        `{in, out, hash_ids: [[first id, count], ...], api_time, think_time}`, ids local to the session, or
        `{type: "subagent", t, requests: [...]}`. A request waits for the one before it, then thinks. Where
        its ids begin with all of its predecessor's, those beyond are also what was generated then.
    csv: a header with `TIMESTAMP, ContextTokens, GeneratedTokens`; nothing is shared.
    requests: JSON lines `{time_s, prompt_tokens, completion_tokens}` and, if known, `blocks` (chained hashes
        of `block_tokens` tokens each, default 128), `session`, `slo_ttft_ms`, `slo_tpot_ms`: what a gateway's
        log can be turned into.
    log: the gateway's own log, with `logging.prompt_blocks` on; see `log_lines`.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import orjson

from metadata_center.files import open_regular
from tokenway.simulator.replay.log_lines import EndedRequest, ended_request, request_records
from tokenway.simulator.replay.trace import (
    Runs,
    Timing,
    Trace,
    TraceRequest,
    beyond,
    cut,
    num_blocks,
    runs_of,
    shared_blocks,
)

MOONCAKE_BLOCK_TOKENS: Final = 512
"""Of the published traces."""

LOG_BLOCK_TOKENS: Final = 128
"""The product's blocks of 512 bytes, at four bytes a token."""

SESSION_SPAN_S: Final = 3600.0
"""At speed 1 all sessions of a file begin within an hour: about as long as half of them last."""

PRIVATE_BLOCK_TOKENS: Final = 128
"""Of traces without ids, where it does not matter."""

_CSV_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_MAX_LINE_TOKENS: Final = 10_000_000
"""Ten times the longest context that any engine serves: more is a mistake in the file."""

MAX_LINE_BYTES: Final = 8 * 1024 * 1024
"""A session of 1,000 requests has some 1 MB. Compressed, a line of 300 MB takes 300 KB of a file."""

MAX_FILE_BYTES: Final = 4 * 1024**3
"""Decompressed; the largest published traces have 1 to 2 GB."""

MAX_PIECES: Final = 20_000_000
"""Requests, runs of block ids and names of a trace together, by what takes 100 bytes: some 2 GB of memory."""

_COMMON: Final = 1 << 40
"""Ids from here on are shared between sessions; those of sessions stay below."""


class Format(StrEnum):
    """The file formats."""

    MOONCAKE = "mooncake"
    SESSIONS = "sessions"
    CSV = "csv"
    REQUESTS = "requests"
    LOG = "log"


class TraceError(ValueError):
    """A trace cannot be read; the message names file and line."""


def read_trace(path: Path, form: Format | None = None) -> Trace:
    """Read a trace file.

    Args:
        path: Where.
        form: Its format; None guesses it from the name's ending and the first line.

    Raises:
        TraceError: A line is not of that format, or there is none.
        OSError: The file cannot be read.
    """
    name = path.name.split(".")[0]
    lines = _lines(path)
    try:
        first = next(lines)
    except StopIteration:
        raise TraceError(f"{path}: the file is empty") from None
    form = form or _guess(path, first)
    numbered = enumerate(_again(first, lines), start=1)
    match form:
        case Format.MOONCAKE:
            return _mooncake(path, name, numbered)
        case Format.SESSIONS:
            return _sessions(path, name, numbered)
        case Format.CSV:
            return _csv(path, name, numbered)
        case Format.REQUESTS:
            documents = ((f"{path}:{at}", _object(path, at, line)) for at, line in numbered)
            return _requests(name, documents)
        case Format.LOG:
            return _log(path, name, numbered)


def _lines(path: Path) -> Iterator[str]:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    total = number = 0
    try:
        with open_regular(path) as packed, openers.get(path.suffix, nullcontext)(packed) as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise TraceError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes")
                if total > MAX_FILE_BYTES:
                    raise TraceError(f"{path}:{number}: the file has more than {MAX_FILE_BYTES} bytes")
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if line.strip():
                    yield line.decode()
    except UnicodeDecodeError:
        raise TraceError(f"{path}:{number}: not UTF-8") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(f"{path}: {type(error).__name__} while decompressing") from None


class _Room:
    """Counts what a trace holds, and ends the reading of one that memory does not."""

    def __init__(self) -> None:
        self._left = MAX_PIECES

    def take(self, where: str, pieces: int = 0, name: str | None = None) -> None:
        """Another request with so many runs or ids, of a session with this name."""
        self._left -= 1 + pieces + (0 if name is None else len(name) // 100)
        if self._left < 0:
            raise TraceError(f"{where}: the trace has more than {MAX_PIECES} requests and runs of block ids")


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _guess(path: Path, first: str) -> Format:
    if not first.lstrip().startswith("{"):
        return Format.CSV
    document = _object(path, 1, first)
    if "logger" in document:
        return Format.LOG
    if "hash_ids" in document:
        return Format.MOONCAKE
    return Format.SESSIONS if "requests" in document else Format.REQUESTS


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise TraceError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise TraceError(f"{path}:{number}: not a JSON object")
    return document


def _tokens(where: str, document: dict[str, Any], key: str, default: int | None = None) -> int:
    count = document.get(key, default)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MAX_LINE_TOKENS:
        raise TraceError(f"{where}: {key} is not a number of tokens")
    return count if count or default is not None else 1  # an engine computes at least one and makes one


def _seconds(where: str, document: dict[str, Any], key: str, default: float | None = None) -> float:
    given = document.get(key, default)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0.0 <= given < 1e12:
        raise TraceError(f"{where}: {key} is not a time")
    return float(given)


def _ids(where: str, document: dict[str, Any], key: str) -> list[int]:
    ids = document.get(key)
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise TraceError(f"{where}: {key} is not a list of ids")
    return ids


def _mooncake(path: Path, name: str, lines: Iterator[tuple[int, str]]) -> Trace:
    requests = []
    room = _Room()
    for number, line in lines:
        where, document = f"{path}:{number}", _object(path, number, line)
        prompt = _tokens(where, document, "input_length")
        ids = _ids(where, document, "hash_ids")
        runs = runs_of(ids)
        room.take(where, len(runs))
        requests.append(
            TraceRequest(
                _seconds(where, document, "timestamp") / 1000.0,
                prompt,
                _tokens(where, document, "output_length"),
                runs,
                min(prompt, len(ids) * MOONCAKE_BLOCK_TOKENS),
            )
        )
    begun_s = min(request.arrival_s for request in requests)
    shifted = (replace(request, arrival_s=request.arrival_s - begun_s) for request in requests)
    return Trace(name, MOONCAKE_BLOCK_TOKENS, tuple(shifted), Timing.TICKS)


@dataclass(slots=True)
class _Turn:
    """A request of a session as read, before its followers are known."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    runs: Runs
    after: int | None
    think_s: float
    followers: list[int] = field(default_factory=list)


class _SessionReader:
    """Collects sessions; their ids become global, and equal tool definitions get common ids."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_id = 0
        self._room = _Room()
        self._tools: dict[tuple[str, int], int] = {}
        self.block_tokens = 0
        self.sessions = 0
        self.requests: list[TraceRequest] = []

    def read(self, number: int, line: str) -> None:
        """Take one session's line."""
        where, session = f"{self._path}:{number}", _object(self._path, number, line)
        block_tokens = _tokens(where, session, "block_size")
        if self.block_tokens not in (0, block_tokens):
            raise TraceError(f"{where}: block_size differs from that of the sessions before")
        self.block_tokens = block_tokens
        self.sessions += 1
        turns: list[_Turn] = []
        self._chain(where, session, turns, None, 0.0)
        first, offset = len(self.requests), self._next_id
        name = str(session.get("id", number))
        for turn in turns:
            runs, keyed_tokens = self._with_answer(turn, turns)
            self._room.take(where, len(runs), name)
            self.requests.append(
                TraceRequest(
                    turn.arrival_s,
                    turn.prompt_tokens,
                    turn.output_tokens,
                    tuple((start if start >= _COMMON else start + offset, count) for start, count in runs),
                    keyed_tokens,
                    name,
                    None if turn.after is None else first + turn.after,
                    turn.think_s,
                )
            )
            own = (start + count for start, count in turn.runs if start < _COMMON)
            self._next_id = max([self._next_id, *(offset + end for end in own)])

    def _chain(
        self, where: str, chain: dict[str, Any], turns: list[_Turn], after: int | None, pause_s: float
    ) -> None:
        """Read the requests of a session or sub-agent; the first comes `pause_s` after `after` ended."""
        requests = chain.get("requests")
        if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
            raise TraceError(f"{where}: requests is not a list of objects")
        tools: Runs | None = None
        ended_s = 0.0
        for request in requests:
            begun_s = _seconds(where, request, "t", 0.0)
            if request.get("type") == "subagent":
                self._chain(where, request, turns, after, max(0.0, begun_s - ended_s))
                continue
            runs = _given_runs(where, request)
            if tools is None:
                tools = cut(runs, _tokens(where, chain, "tool_tokens", 0) // self.block_tokens)
                think_s = pause_s
            else:
                think_s = _seconds(where, request, "think_time", 0.0)
            shared = shared_blocks(tools, runs)
            if shared:
                runs = ((self._common(chain, num_blocks(tools)), shared), *beyond(runs, shared))
            if after is not None:
                turns[after].followers.append(len(turns))
            turns.append(
                _Turn(
                    begun_s if after is None else 0.0,
                    _tokens(where, request, "in"),
                    _tokens(where, request, "out"),
                    runs,
                    after,
                    think_s,
                )
            )
            after = len(turns) - 1
            ended_s = begun_s + _seconds(where, request, "api_time", 0.0)

    def _common(self, chain: dict[str, Any], blocks: int) -> int:
        """First common id of so many blocks of this model's tool definitions."""
        models = chain.get("models")
        model = str(models[0]) if isinstance(models, list) and models else ""
        return self._tools.setdefault((model, blocks), _COMMON + len(self._tools) * _MAX_LINE_TOKENS)

    def _with_answer(self, turn: _Turn, turns: list[_Turn]) -> tuple[Runs, int]:
        """The turn's ids with those that its answer has in a follower's prompt, and the tokens they cover."""
        blocks = num_blocks(turn.runs)
        total = turn.prompt_tokens + turn.output_tokens
        for index in turn.followers:
            runs = turns[index].runs
            if shared_blocks(turn.runs, runs) == blocks < num_blocks(runs):
                runs = cut(runs, total // self.block_tokens)
                return runs, min(total, num_blocks(runs) * self.block_tokens)
        return turn.runs, min(turn.prompt_tokens, blocks * self.block_tokens)


def _given_runs(where: str, request: dict[str, Any]) -> Runs:
    given = request.get("hash_ids")
    if not isinstance(given, list):
        raise TraceError(f"{where}: hash_ids is not a list")
    runs = []
    for run in given:
        match run:
            case [int(first), int(count)] if 0 <= first < _COMMON and 0 < count <= _MAX_LINE_TOKENS:
                runs.append((first, count))
            case _:
                raise TraceError(f"{where}: hash_ids is not a list of [first id, count]")
    return tuple(runs)


def _sessions(path: Path, name: str, lines: Iterator[tuple[int, str]]) -> Trace:
    reader = _SessionReader(path)
    for number, line in lines:
        reader.read(number, line)
    return Trace(
        name,
        reader.block_tokens,
        tuple(reader.requests),
        Timing.SESSIONS,
        sessions_per_s=reader.sessions / SESSION_SPAN_S,
    )


def _csv(path: Path, name: str, lines: Iterator[tuple[int, str]]) -> Trace:
    _, header = next(lines)
    columns = [column.strip() for column in header.split(",")]
    try:
        time_at, prompt_at, output_at = (columns.index(column) for column in _CSV_COLUMNS)
    except ValueError:
        raise TraceError(f"{path}:1: the header lacks one of {', '.join(_CSV_COLUMNS)}") from None
    begun_s: float | None = None
    requests = []
    room = _Room()
    for number, line in lines:
        room.take(f"{path}:{number}")
        fields = line.strip().split(",")
        try:
            time_s = datetime.fromisoformat(fields[time_at].strip()).replace(tzinfo=UTC).timestamp()
            prompt, output = max(1, int(fields[prompt_at])), max(1, int(fields[output_at]))
        except (ValueError, IndexError):
            raise TraceError(f"{path}:{number}: not a time and two numbers of tokens") from None
        if max(prompt, output) > _MAX_LINE_TOKENS:
            raise TraceError(f"{path}:{number}: more than {_MAX_LINE_TOKENS} tokens")
        begun_s = time_s if begun_s is None else begun_s
        requests.append(TraceRequest(max(0.0, time_s - begun_s), prompt, output))
    if not requests:
        raise TraceError(f"{path}: there are no requests")
    return Trace(name, PRIVATE_BLOCK_TOKENS, tuple(requests))


def _log(path: Path, name: str, lines: Iterator[tuple[int, str]]) -> Trace:
    """Lines of several gateways may be mixed; whatever is no request's line is passed over."""
    ended: list[EndedRequest] = []
    room = _Room()
    for number, line in lines:
        try:
            request = ended_request(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue  # what other programs write to the same stream
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {error}") from None
        if request is not None:
            room.take(f"{path}:{number}", len(request.blocks))
            ended.append(request)
    if not ended:
        raise TraceError(
            f"{path}: no request has token counts; request.usage_injection asks engines for them"
        )
    return _requests(name, ((str(path), document) for document in request_records(ended)))


def _requests(name: str, documents: Iterator[tuple[str, dict[str, Any]]]) -> Trace:
    id_of: dict[int, int] = {}
    block_tokens = 0
    begun_s: float | None = None
    requests = []
    room = _Room()
    for where, document in documents:
        given = _tokens(where, document, "block_tokens", LOG_BLOCK_TOKENS)
        if block_tokens not in (0, given):
            raise TraceError(f"{where}: block_tokens differs from that of the lines before")
        block_tokens = given
        time_s = _seconds(where, document, "time_s")
        begun_s = time_s if begun_s is None else begun_s
        prompt = _tokens(where, document, "prompt_tokens")
        blocks = _ids(where, document, "blocks") if "blocks" in document else []
        known = len(id_of)
        ids = [id_of.setdefault(block, len(id_of)) for block in blocks]
        runs = runs_of(ids)
        session = None if document.get("session") is None else str(document["session"])
        room.take(where, len(runs) + len(id_of) - known, session)
        requests.append(
            TraceRequest(
                max(0.0, time_s - begun_s),
                prompt,
                _tokens(where, document, "completion_tokens"),
                runs,
                min(prompt, len(ids) * block_tokens),
                session,
                slo_ttft_s=_limit_s(where, document, "slo_ttft_ms"),
                slo_tpot_s=_limit_s(where, document, "slo_tpot_ms"),
            )
        )
    return Trace(name, block_tokens, tuple(requests))


def _limit_s(where: str, document: dict[str, Any], key: str) -> float | None:
    return None if document.get(key) is None else _seconds(where, document, key) / 1000.0
