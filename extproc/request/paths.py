"""Request paths as engines read them, and what no client may reach by any spelling.

Rules:
    1. `as_engines_read` is the one reading by which a request is inference or not: uvicorn's and aiohttp's.
    2. `loosest` is for refusing only: what the most lenient proxy or engine could take a path for.
    3. A name missing from the tables below passes where `default_cluster` is set: they are read against each
       release of vLLM, SGLang and TensorRT-LLM.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import unquote

ADMIN_PATHS: frozenset[str] = frozenset(
    {
        # vLLM: sleep and pause, caches, weights, adapters, profiler, scale, remote calls into its workers
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/pause",
        "/resume",
        "/is_paused",
        "/abort_requests",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/start_profile",
        "/stop_profile",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/finish_weight_update",
        "/update_weights",
        "/get_world_size",
        "/kv_event_sources",
        "/fault_tolerance",
        # what both say of themselves and their other clients
        "/metrics",
        "/server_info",
        "/load",
        # SGLang
        "/flush_cache",
        "/clear_hicache_storage_backend",
        "/hicache",
        "/get_server_info",
        "/get_internal_state",
        "/set_internal_state",
        "/get_load",
        "/get_loads",
        "/v1/loads",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/init_weights_send_group_for_remote_instance",
        "/send_weights_to_remote_instance",
        "/get_weights_by_name",
        "/get_remote_instance_transfer_engine_info",
        "/update_weights_from_disk",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_ipc",
        "/update_weight_version",
        "/weights_checker",
        "/post_process_weights",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/unload_lora_adapter",
        "/open_session",
        "/close_session",
        "/abort_request",
        "/pause_generation",
        "/continue_generation",
        "/configure_logging",
        "/set_trace_level",
        "/freeze_gc",
        "/slow_down",
        "/start_expert_distribution_record",
        "/stop_expert_distribution_record",
        "/dump_expert_distribution_record",
        "/dumper",
        # TensorRT-LLM
        "/prometheus",
        "/perf_metrics",
        "/kv_cache_events",
        "/release_memory",
        "/resume_memory",
        "/steady_clock_offset",
        "/energy_metrics",
        "/cluster_info",
        "/v1/data_transceiver_state",
        "/_resource_governor",
        "/_internal",
        # doors to inference by which bodies would pass unread: neither sanitised nor counted
        "/invocations",
        "/generate",
        "/generate_from_file",
        "/encode",
        "/vertex_generate",
        "/inference",
        "/generative_scoring",
        "/v1/chat/completions/batch",
        "/api/generate",
        "/api/chat",
    }
)
"""Paths by which engines are administered; each stands for what is below it as well. Lower case."""

_ADMIN_PREFIXES = ("/update_weight", "/start_profile", "/stop_profile", "/debug")
"""Families that grow with each release."""

_MAX_DECODINGS = 4
"""A path that still has escapes after as many is no client's spelling of anything."""

_SEGMENT_PARAMETERS = re.compile(r";[^/]*")
_SLASHES = re.compile(r"[/\\]+")
_NOISE = re.compile(r"[^a-z0-9/_.-]+")


def as_engines_read(path: str) -> str:
    """The path an engine routes by: percent-decoded once, without query string and one trailing slash."""
    path = path.partition("?")[0]
    if "%" in path:
        path = unquote(path)
    return path.removesuffix("/")


def without_slash(path: str) -> str | None:
    """The same path and query string without the slash at the path's end; None if there is none."""
    bare, mark, query = path.partition("?")
    return f"{bare[:-1]}{mark}{query}" if bare.endswith("/") else None


def loosest(path: str, *, keeps_marks: bool = False) -> str | None:
    """What the path could be taken for: decoded to the end, lower case, no `;params`, dot segments, oddities.

    Args:
        path: As it came, with its query string or without.
        keeps_marks: A question mark or hash that was encoded is an oddity; else the path ends there.

    Returns:
        The path without trailing slash, `""` for the root; None if that is unknown: it is decoded again and
        again.
    """
    path = path.partition("?")[0]
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(path)
        if decoded == path:
            break
        path = decoded
    else:
        return None
    path = path.lower() if keeps_marks else path.partition("?")[0].partition("#")[0].lower()
    path = _NOISE.sub("", _SLASHES.sub("/", _SEGMENT_PARAMETERS.sub("", path)))
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    return "".join(f"/{segment}" for segment in kept)


def is_admin(path: str, allowed: Collection[str] = ()) -> bool:
    """True if an engine could take `path` for one by which it is administered.

    Args:
        path: From `loosest`.
        allowed: Paths that are fine after all, with what is below them.
    """
    above = [path[:end] for end in _ends(path)]
    if any(each in allowed for each in above):
        return False
    return path.startswith(_ADMIN_PREFIXES) or any(each in ADMIN_PATHS for each in above)


def _ends(path: str) -> list[int]:
    """Where each segment of `path` ends."""
    return [at for at in range(1, len(path) + 1) if at == len(path) or path[at] == "/"]
