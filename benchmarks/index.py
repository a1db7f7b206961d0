"""The cache map: block events per second, lookup time, bytes per block and endpoint, against tokenizing.

    python -m benchmarks.index [blocks ...]     by default 1,000,000 and 10,000,000

Decoding is in, sockets are not. Times are CPU times, so that neighbours on the machine disturb them less; the
garbage collector is set as the server sets it; each size has a process of its own, so that its memory can be
measured. Prompts are Python's own sources, cut by a byte-level BPE trained on them when the benchmark starts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.processes import cpu_name, rss_mib
from metadata_center.cache_map.cache_map import CacheMap
from metadata_center.cache_map.holders import Replica
from metadata_center.kv_events.decoding import decode
from metadata_center.roots import root
from metadata_center.types import EndpointKey
from tokenway.cli.serve import GC_THRESHOLDS

BLOCK_TOKENS: Final = 16
"""vLLM's default on GPUs, and the dearest: the fewer tokens a block has, the more blocks there are."""

EVENT_BLOCKS: Final = 64
CHAIN_EVENTS: Final = 4
"""256 blocks: a prompt of 4,096 tokens, as chunked prefill announces it."""

STEPS: Final = 32
"""Blocks of an answer: 512 tokens."""

ENDPOINTS: Final = 100
LOOKUP_BLOCKS: Final = (100, 2_000, 8_000)
LOOKUP_ENDPOINTS: Final = (10, 100, 1_000)
PIECES: Final = 32  # batches that are encoded, then timed, at a time: few enough to be in cache, as received

Ids = list[int]
Batches = list[tuple[Replica, bytes]]


def tokenizer() -> tuple[Tokenizer, list[bytes], Ids, bytes]:
    """A tokenizer, the bytes of its tokens, the corpus as tokens, and the corpus."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=16_384, initial_alphabet=alphabet, show_progress=False)
    made.train([str(path) for path in files], trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    words = [made.id_to_token(token) or "" for token in range(made.get_vocab_size())]
    vocabulary = [bytes(spelled[letter] for letter in word) for word in words]
    corpus = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    ids = made.encode(corpus).ids
    return made, vocabulary, ids, b"".join(vocabulary[token] for token in ids)


def stored(hashes: list[int], parent: int | None, token_ids: Ids) -> dict[str, Any]:
    """A stored event as vLLM sends it."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": token_ids,
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }


def removed(block_hash: int) -> dict[str, Any]:
    """A removed event as vLLM sends it: one for each block."""
    return {"type": "BlockRemoved", "block_hashes": [block_hash], "medium": "GPU", "group_idx": 0}


def payload(events: list[dict[str, Any]]) -> bytes:
    """A batch as it comes from the socket."""
    return msgspec.msgpack.encode([time.time(), events, 0])


class Engines:
    """What the engines announce, and what they could evict.

    Args:
        replicas: The endpoints that announce, in turn.
        ids: The corpus.
        seed: Of the random numbers.
    """

    def __init__(self, replicas: list[Replica], ids: Ids, seed: int) -> None:
        self.replicas, self.ids, self.random = replicas, ids, random.Random(seed)
        self.chains: deque[tuple[int, array[int]]] = deque()
        self.turn = 0

    def hashes(self, count: int) -> list[int]:
        """Names of new blocks."""
        return [self.random.getrandbits(64) for _ in range(count)]

    def tokens(self, blocks: int) -> Ids:
        """A random part of the corpus."""
        start = self.random.randrange(len(self.ids) - blocks * BLOCK_TOKENS)
        return self.ids[start : start + blocks * BLOCK_TOKENS]

    def prefill(self) -> Batches:
        """One prompt that is new to all, in the batches of four engine steps."""
        self.turn += 1
        number = self.turn % len(self.replicas)
        chain = array("Q")
        batches: Batches = []
        for _ in range(CHAIN_EVENTS):
            parent = chain[-1] if chain else None
            hashes = self.hashes(EVENT_BLOCKS)
            event = stored(hashes, parent, self.tokens(EVENT_BLOCKS))
            batches.append((self.replicas[number], payload([event])))
            chain.extend(hashes)
        self.chains.append((number, chain))
        return batches

    def evict(self, count: int) -> tuple[int, list[dict[str, Any]]]:
        """Events for the last blocks of the chain that is oldest, and whose they are."""
        number, chain = self.chains[0]
        count = min(count, len(chain))
        events = [removed(block_hash) for block_hash in chain[: -count - 1 : -1]]
        del chain[-count:]
        if not chain:
            self.chains.popleft()
        return number, events

    def decode(self, sequences: int) -> Batches:
        """Prompts of one replica go on by `STEPS` blocks of generated tokens each, a batch per block."""
        self.turn += 1
        number = self.turn % len(self.replicas)
        self.chains.rotate(-1)
        growing = [chain for owner, chain in self.chains if owner == number][:sequences]
        batches: Batches = []
        for _ in range(STEPS):
            events = []
            for chain in growing:
                (block_hash,) = self.hashes(1)
                events.append(stored([block_hash], chain[-1], self.tokens(1)))
                chain.append(block_hash)
            batches.append((self.replicas[number], payload(events)))
        return batches


def timed(cache_map: CacheMap, batches: Batches) -> float:
    """CPU seconds to decode and apply."""
    started = time.process_time()
    for replica, body in batches:
        cache_map.apply(replica, decode(body))
    return time.process_time() - started


def rate(cache_map: CacheMap, make: Callable[[], Batches], blocks: int) -> float:
    """Block events per second, of at least `blocks`; making the batches is not timed."""
    spent, done = 0.0, 0
    while done < blocks:
        batches: Batches = []
        while len(batches) < PIECES:
            batches += make()
        before = cache_map.stats
        spent += timed(cache_map, batches)
        after = cache_map.stats
        done += after.announced + after.removed - before.announced - before.removed
    return done / spent


def attach(cache_map: CacheMap, count: int, vocabulary: list[bytes], net: int) -> list[Replica]:
    """Replicas of new endpoints in 10.`net`.0.0/16."""
    keys = [EndpointKey(f"10.{net}.{i // 250}.{i % 250}:8000") for i in range(count)]
    return [cache_map.attach(key, 0, "m", vocabulary) for key in keys]


def mixed(engines: Engines) -> Batches:
    """As many removed as stored: eight prompts, an answer of 32 blocks to each, and the room they need."""
    batches = [batch for _ in range(8) for batch in engines.prefill()] + engines.decode(8)
    wanted = 8 * (CHAIN_EVENTS * EVENT_BLOCKS + STEPS)
    while wanted > 0:
        owner, events = engines.evict(min(wanted, EVENT_BLOCKS))
        wanted -= len(events)
        batches.append((engines.replicas[owner], payload(events)))
    return batches


def rates(blocks: int, vocabulary: list[bytes], ids: Ids) -> tuple[dict[str, float], CacheMap]:
    """Rates and memory of a map of `blocks` blocks that no two endpoints share; and the map."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what training left behind would be filled first, unseen
    before_mib = rss_mib(os.getpid())
    cache_map = CacheMap(max_blocks=2 * blocks + 10_000_000, max_blocks_per_replica=blocks)
    engines = Engines(attach(cache_map, ENDPOINTS, vocabulary, 0), ids, 1)
    found = {"prefill_per_s": rate(cache_map, engines.prefill, blocks)}
    gc.collect()
    chains_bytes = sum(sys.getsizeof(chain) for _, chain in engines.chains)
    grown = (rss_mib(os.getpid()) - before_mib) * 1024 * 1024 - chains_bytes
    found["bytes_per_block_endpoint"] = grown / cache_map.stats.held
    sample = min(blocks // 5, 200_000)
    found["decode_per_s"] = rate(cache_map, lambda: engines.decode(32), sample)
    found["mixed_per_s"] = rate(cache_map, lambda: mixed(engines), sample)

    def evicting() -> Batches:
        number, events = engines.evict(64)
        return [(engines.replicas[number], payload(events))]

    found["removed_per_s"] = rate(cache_map, evicting, sample)
    for replica in engines.replicas[: ENDPOINTS // 2]:
        cache_map.clear(replica)
    cleared = cache_map.stats.stored - cache_map.stats.held
    started = time.process_time()
    slowest = 0.0
    more = True
    while more:
        step = time.process_time()
        more = cache_map.sweep(16)
        slowest = max(slowest, time.process_time() - step)
    found["swept_per_s"] = cleared / (time.process_time() - started)
    found["slowest_sweep_ms"] = slowest * 1e3
    return found, cache_map


def shared(vocabulary: list[bytes], ids: Ids) -> dict[str, float]:
    """Ten endpoints that all hold the same million blocks: rate and memory of those after the first."""
    cache_map = CacheMap()
    first, *others = attach(cache_map, 10, vocabulary, 1)
    engines = Engines([first], ids, 2)
    chunks: list[list[bytes]] = []
    for _ in range(8):
        chunk = [body for _ in range(50) for _, body in engines.prefill()]
        timed(cache_map, [(first, body) for body in chunk])
        chunks.append(chunk)
    gc.collect()
    before_mib, held = rss_mib(os.getpid()), cache_map.stats.held
    spent = sum(timed(cache_map, [(other, body) for body in chunk]) for other in others for chunk in chunks)
    gc.collect()
    more = cache_map.stats.held - held
    grown = (rss_mib(os.getpid()) - before_mib) * 1024 * 1024
    return {"known_per_s": more / spent, "bytes_per_block_endpoint": max(grown, 0) / more}


def lookups(
    cache_map: CacheMap, vocabulary: list[bytes], ids: Ids, made: Tokenizer
) -> Iterator[tuple[str, dict[str, float]]]:
    """Microseconds to match prompts in a map that is full of others, and to tokenize them."""
    engines = Engines(attach(cache_map, max(LOOKUP_ENDPOINTS), vocabulary, 3), ids, 4)
    for blocks in LOOKUP_BLOCKS:
        token_ids = ids[: blocks * BLOCK_TOKENS]
        hashes = engines.hashes(blocks)
        for number, replica in enumerate(engines.replicas):  # each holds a little less than the one before
            count = blocks - blocks * (number % 10) // 20
            for start in range(0, count, EVENT_BLOCKS):
                stop = min(start + EVENT_BLOCKS, count)
                parent = hashes[start - 1] if start else None
                part = token_ids[start * BLOCK_TOKENS : stop * BLOCK_TOKENS]
                timed(cache_map, [(replica, payload([stored(hashes[start:stop], parent, part)]))])
        text = b"".join(vocabulary[token] for token in token_ids) + b"\n# and then"
        start_at = root("m", None, None)
        found: dict[str, float] = {}
        for count in LOOKUP_ENDPOINTS:
            keys = tuple(replica.endpoint for replica in engines.replicas[:count])
            cache_map.match(start_at, text, keys)
            took = []
            for _ in range(41):
                started = time.process_time()
                matches = cache_map.match(start_at, text, keys)
                took.append((time.process_time() - started) * 1e6)
            assert max(matches.blocks) == blocks
            assert len(set(matches.blocks)) == 10
            found[f"{count}_endpoints_us"] = statistics.median(took)
        spelled = text.decode()
        took = []
        for _ in range(5):
            started = time.process_time()
            made.encode(spelled)
            took.append((time.process_time() - started) * 1e6)
        found["tokenizing_us"] = statistics.median(took)
        yield str(blocks), found
        for replica in engines.replicas:
            cache_map.clear(replica)


def measured(blocks: int, task: str) -> dict[str, Any]:
    """What one process finds out: `task` is "rates", "lookups" (in a map of `blocks` others) or "shared"."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    made, vocabulary, ids, text = tokenizer()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if task == "shared":
        found: dict[str, Any] = dict(shared(vocabulary, ids))
        found["corpus_bytes_per_token"] = len(text) / len(ids)
        return found
    rated, cache_map = rates(blocks, vocabulary, ids)
    return dict(rated) if task == "rates" else dict(lookups(cache_map, vocabulary, ids, made))


def main() -> None:
    """Print figures as they come, then all of them as one JSON object."""
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measured(int(sys.argv[2]), sys.argv[3]), default=float))
        return
    sizes = [int(argument) for argument in sys.argv[1:]] or [1_000_000, 10_000_000]
    machine = f"{cpu_name()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    print(machine, flush=True)
    figures: dict[str, Any] = {"machine": machine, "block_tokens": BLOCK_TOKENS}
    for task, blocks in [("shared", 0), ("lookups", sizes[0]), *(("rates", size) for size in sizes)]:
        command = [sys.executable, "-m", "benchmarks.index", "measure", str(blocks), task]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own
        found = json.loads(done.stdout)
        name = task if task != "rates" else f"{blocks}_blocks"
        figures[name] = found
        print(name)
        for key, value in found.items():
            print(f"    {key}: {_rounded(value)}", flush=True)
    print(json.dumps(figures))


def _rounded(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_rounded(each)}" for key, each in value.items())
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
