"""Where a fit begins: step-model constants from what is published about a card and a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tokenway.simulator.engine.profile import EngineProfile

LINEAR_SHARE: Final = 0.6
"""Of a card's peak that large bf16 matrix products usually reach."""

ATTENTION_SHARE: Final = 0.4
"""Of the peak that prefill attention reaches, as in the constants of the shipped profiles."""

MEMORY_SHARE: Final = 0.9
"""vLLM's default `gpu_memory_utilization`."""

ACTIVATION_BYTES: Final = 2e9
"""Kept free of KV cache for activations and graphs: about what vLLM reports for 8B models."""


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator.

    Attributes:
        bytes_per_s: Memory bandwidth.
        flops_per_s: Dense bf16 with 32-bit accumulation.
        memory_bytes: Of the card.
    """

    bytes_per_s: float
    flops_per_s: float
    memory_bytes: float


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer in bf16, or what one data-parallel rank has of it.

    Attributes:
        weight_bytes: In memory.
        read_bytes: Of them, read by a step of a few tokens.
        params_per_token: Parameters that one token is multiplied with.
        attention_width: Query heads times their size, times layers.
        kv_bytes_per_token: All layers.
    """

    weight_bytes: float
    read_bytes: float
    params_per_token: float
    attention_width: float
    kv_bytes_per_token: float


def from_datasheet(name: str, card: Card, model: Model, **limits: Any) -> EngineProfile:
    """A profile that was not measured.

    Args:
        name: Of the profile.
        card: Its hardware.
        model: What it serves.
        **limits: Further fields of `EngineProfile`; without `kv_tokens` all free memory is cache.
    """
    free = MEMORY_SHARE * card.memory_bytes - model.weight_bytes - ACTIVATION_BYTES
    return EngineProfile(
        name,
        a_ms=1.0,
        w0_ms=1e3 * model.read_bytes / card.bytes_per_s,
        b_ms_per_token=1e3 * 2.0 * model.params_per_token / (LINEAR_SHARE * card.flops_per_s),
        c_ms_per_pair=1e3 * 4.0 * model.attention_width / (ATTENTION_SHARE * card.flops_per_s),
        d_ms_per_context_token=1e3 * model.kv_bytes_per_token / card.bytes_per_s,
        e_ms_per_seq=0.02,  # a choice, as in the shipped profiles
        alpha0_ms=3.0,  # likewise: what the quickest requests of measured runs took beyond the very quickest
        **{"kv_tokens": int(free / model.kv_bytes_per_token)} | limits,
    )
