"""What an engine's `/metrics` says of its cache and of how full it is.

Rules:
    1. The few needed series are found in the text, without parsing the rest. Any bytes give `EngineFacts`.
    2. A number that no engine has is not believed: the reading it is part of is none (docs/adr/0018).
    3. What counts once is counted once. Each of vLLM's data-parallel ranks repeats the capacity of all, and
       counts its own requests. Each of SGLang's has its own of both, which its tensor-parallel ranks may
       repeat; with priorities it counts requests once more by each of them, beside their total.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

_MAX_LINE_BYTES: Final = 16 * 1024
_MAX_SERIES: Final = 4096
"""Of one name on one page, and the length of each: ranks times adapters, and vLLM's longest line is 1 KB."""

_MAX_BLOCK_TOKENS: Final = 1 << 20
"""Tokens per cache block, as `kv_events.events.BlockSize` bounds them."""

_MAX_KV_TOKENS: Final = 1 << 40
"""Of one endpoint: a thousand times what 1,000 GPUs hold of the smallest model (10 KB a token)."""

_MAX_REQUESTS: Final = float(1 << 20)
"""Running or waiting at one rank: engines run some hundreds, and queue what clients keep open."""

_MOST_UNIX_S: Final = 1e11
"""Of a process's start: some thousand years from now."""

_MOST_TOKENS: Final = 1e18
"""Of all prompts that an engine ever computed: beyond it a float counts by hundreds."""

_VLLM_CACHE: Final = b"vllm:cache_config_info{"
_SGLANG_CACHE: Final = b"sglang:cache_config_info{"
_SGLANG_PAGES: Final = b"sglang:num_pages{"
_SGLANG_PAGE_SIZE: Final = b"sglang:page_size{"
"""SGLang says it in labels, from 0.5.11 on by gauges."""

_SLEEP_SERIES: Final = b"vllm:engine_sleep_state{"
_RUNNING_SERIES: Final = (b"vllm:num_requests_running{", b"sglang:num_running_reqs{")
_WAITING_SERIES: Final = (b"vllm:num_requests_waiting{", b"sglang:num_queue_reqs{")
_USAGE_SERIES: Final = (b"vllm:kv_cache_usage_perc{", b"sglang:token_usage{")
_FORMER_USAGE_SERIES: Final = b"vllm:gpu_cache_usage_perc{"
"""The same by its name before vLLM 0.9.2, which 0.9.2 to 0.10 have beside the new one. The other series
that are read have had one name since vLLM 0.4, or since there is one.

Source: vLLM, pull requests 18354, 24245, 29330."""
_PROMPTS_SERIES: Final = (b"vllm:prompt_tokens_total{", b"sglang:prompt_tokens_total{")
_STARTED_SERIES: Final = b"process_start_time_seconds "
"""Of vLLM's API server, which ends with its engine; SGLang has no such series."""

_SGLANG: Final = b"sglang:"
_RANK: Final = re.compile(rb'[{,]dp_rank="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How full an engine said it was, as of its last step; data-parallel ranks together.

    Attributes:
        running: Requests in its batch.
        waiting: Requests in its queue.
        kv_usage_ratio: Share of the KV cache that running requests hold, of the fullest rank, 0..1.
        started_s: When its process began, Unix seconds; None if it does not say.
        prompt_tokens: Of all prompts that it has computed since; None if it does not say.
    """

    running: int
    waiting: int
    kv_usage_ratio: float
    started_s: float | None = None
    prompt_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What `/metrics` says about an engine that requests do not.

    Attributes:
        kv_tokens: Capacity of the KV cache in tokens, all data-parallel ranks together, or None.
        block_size: Tokens per cache block, or None; set exactly when `kv_tokens` is.
        is_asleep: True if any engine behind the endpoint says it is not awake.
        occupancy: How full it is, or None.
    """

    kv_tokens: int | None
    block_size: int | None
    is_asleep: bool
    occupancy: Occupancy | None = None


def engine_facts(exposition: bytes) -> EngineFacts:
    """Read a Prometheus text exposition; absent or malformed series give None and "awake"."""
    kv_tokens, block_size = _capacity(exposition) or (None, None)
    is_asleep = any(
        b'sleep_state="awake"' in line and _value(line, 1.0) == 0.0
        for line in _lines(exposition, _SLEEP_SERIES)
    )
    return EngineFacts(kv_tokens, block_size, is_asleep, _occupancy(exposition))


def _capacity(exposition: bytes) -> tuple[int, int] | None:
    """Tokens of the whole KV cache and of one of its blocks."""
    found = [
        (count, size)
        for line in _lines(exposition, _VLLM_CACHE)
        if (count := _int_label(line, b"num_gpu_blocks")) and (size := _int_label(line, b"block_size"))
    ]
    sizes = [_value(line, _MAX_BLOCK_TOKENS) for line in _lines(exposition, _SGLANG_PAGE_SIZE)]
    pages = _by_rank(exposition, _SGLANG_PAGES, _MAX_KV_TOKENS)
    if len(set(sizes)) == 1 and -1.0 not in pages:
        found.append((int(sum(pages)), int(sizes[0])))
    of_ranks: dict[bytes, tuple[int, int]] = {}
    for line in _lines(exposition, _SGLANG_CACHE):
        count, size = _int_label(line, b"num_pages"), _int_label(line, b"page_size")
        if count and size:
            of_ranks[_rank(line)] = max(of_ranks.get(_rank(line), (0, 0)), (count, size))
    if len({size for _, size in of_ranks.values()}) == 1:
        found.append((sum(count for count, _ in of_ranks.values()), next(iter(of_ranks.values()))[1]))
    believed = [
        (count * size, size)
        for count, size in found
        if 0 < size <= _MAX_BLOCK_TOKENS and 0 < count * size <= _MAX_KV_TOKENS
    ]
    return max(believed, default=None)


def _occupancy(exposition: bytes) -> Occupancy | None:
    running, waiting, usage = (
        [value for name in series for value in _by_rank(exposition, name, most)]
        for series, most in (
            (_RUNNING_SERIES, _MAX_REQUESTS),
            (_WAITING_SERIES, _MAX_REQUESTS),
            (_USAGE_SERIES, inf),
        )
    )
    usage = usage or [*_by_rank(exposition, _FORMER_USAGE_SERIES, inf)]
    if not (running and waiting and usage) or -1.0 in (*running, *waiting, *usage):
        return None
    started = [_value(line, _MOST_UNIX_S) for line in _lines(exposition, _STARTED_SERIES)]
    started_s = started[0] if len(started) == 1 and started[0] > 0.0 else None
    prompts = [_value(line, _MOST_TOKENS) for name in _PROMPTS_SERIES for line in _lines(exposition, name)]
    prompt_tokens = sum(prompts) if prompts and -1.0 not in prompts else None
    return Occupancy(int(sum(running)), int(sum(waiting)), min(1.0, max(usage)), started_s, prompt_tokens)


def _by_rank(exposition: bytes, series: bytes, most: float) -> Sequence[float]:
    """Values that may be added up; -1 among them as of `_value`."""
    if not series.startswith(_SGLANG):
        return [_value(line, most) for line in _lines(exposition, series)]
    of_ranks: dict[bytes, float] = {}
    for line in _lines(exposition, series):
        rank, value = _rank(line), _value(line, most)
        before = of_ranks.get(rank, value)
        of_ranks[rank] = -1.0 if -1.0 in (before, value) else max(before, value)
    return list(of_ranks.values())


def _rank(line: bytes) -> bytes:
    """The data-parallel rank that a series of SGLang is of; empty where there is one alone."""
    found = _RANK.search(line)
    return b"" if found is None else found[1]


def _value(line: bytes, most: float) -> float:
    """The value of a sample; -1 if it is no finite number of 0..`most`, which spoils the whole reading.

    Behind it there may be a time, as proxies of `/metrics` add it.
    """
    _, brace, behind = line.rpartition(b"}")
    words = behind.split()[:1] if brace else line.split()[1:2]
    try:
        value = float(words[0])
    except (IndexError, ValueError):
        return -1.0
    return value if 0.0 <= value <= most and value < inf else -1.0


def _lines(text: bytes, prefix: bytes) -> Iterable[bytes]:
    """Lines of `text` that start with `prefix`, without their line end; not those beyond any engine's."""
    text, needle = b"\n" + text, b"\n" + prefix
    at, left = text.find(needle), _MAX_SERIES
    while at >= 0 and left:
        end = text.find(b"\n", at + 1)
        end = end if end >= 0 else len(text)
        if end - at <= _MAX_LINE_BYTES:
            yield text[at + 1 : end].rstrip()
        at, left = text.find(needle, end), left - 1


def _int_label(line: bytes, name: bytes) -> int | None:
    """Value of a label that is a positive integer, else None ("None" before the cache exists)."""
    found = re.search(rb'[{,]%b="([1-9][0-9]{0,15})"' % name, line)
    return int(found[1]) if found else None
