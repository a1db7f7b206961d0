"""What a simulated replica is started with, and what its requests leave for its cache events."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenway.simulator.engine.profile import PROFILES, EngineProfile
from tokenway.simulator.server.text import TokenArray

DEFAULT_MAX_MODEL_LEN = 131_072  # Llama 3.1's context
DEFAULT_BUFFER_STEPS = 10_000  # vLLM's


@dataclass(frozen=True, slots=True)
class BlockSource:
    """What a request leaves behind for its `BlocksStored` events.

    Attributes:
        token_ids: Prompt and output, shape (n,).
        cache_salt: Announced on block 0 only.
        session_id: Announced on every event of the request.
    """

    token_ids: TokenArray
    cache_salt: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class KvEventsConfig:
    """Where cache events go, as in vLLM's `--kv-events-config`.

    Attributes:
        endpoint: Of the PUB socket.
        replay_endpoint: Of the ROUTER socket, or None for no replay.
        topic: First frame of every message.
        bind: True to bind an address that vLLM would connect to.
        buffer_steps: Batches kept for replay.
    """

    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""
    bind: bool = False
    buffer_steps: int = DEFAULT_BUFFER_STEPS


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One replica.

    Attributes:
        models: Names it answers to; the first is the one in metrics and the default.
        profile: Its speed and size.
        time_scale: Real seconds per simulated second, > 0.
        host: Address to listen on.
        port: Port to listen on, 0 for any.
        max_model_len: Most prompt and output tokens together; never more than the KV cache holds.
        engine_id: Data parallel rank, in metrics and cache events.
        kv_events: None for no cache events.
        sse_keep_alive_s: Comment interval before the first token of a stream, or None for no comments.
        request_id_headers: True to echo `X-Request-Id` in responses.
        tokenizer: `tokenizer.json` of a byte-level BPE that cuts and speaks completions, or None.

    Raises:
        ValueError: No model, or a number out of range.
    """

    models: tuple[str, ...] = ("sim",)
    profile: EngineProfile = PROFILES["demo"]
    time_scale: float = 1.0
    host: str = "127.0.0.1"
    port: int = 0
    max_model_len: int = DEFAULT_MAX_MODEL_LEN
    engine_id: int = 0
    kv_events: KvEventsConfig | None = None
    sse_keep_alive_s: float | None = None
    request_id_headers: bool = False
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if not self.models or not all(self.models):
            raise ValueError("at least one model name is needed")
        if self.time_scale <= 0 or self.max_model_len < 2:
            raise ValueError("time_scale must be > 0 and max_model_len at least 2")
        capacity_tokens = self.profile.num_blocks * self.profile.block_size
        object.__setattr__(self, "max_model_len", min(self.max_model_len, capacity_tokens))
