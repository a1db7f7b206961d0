"""What a client may not say to an engine, and the edits the gateway makes to a decoded body.

Rules:
    1. A field or header is *steering* if it picks the engine, the place in its queue, its cache entries
       or its peers, or makes it serve other tokens than those the decision was made on. Steering is
       removed unless the operator allows it by name; the request is then served without it.
    2. `cache_salt` (and SGLang's `extra_key`) stays: it only narrows what a request may share.
    3. Edits happen in place on a body owned by one request, and each says whether it changed anything:
       an unchanged body is forwarded as the bytes that came in.
"""

from __future__ import annotations

from typing import Any

import orjson

from extproc.errors import Reason, RouterError
from extproc.values.requests import Operation

STEERING_FIELDS: tuple[str, ...] = (
    # vLLM. Where to fetch KV from, and `prompt_token_ids` that replace the messages even when no
    # connector is configured (seen on vLLM 0.32).
    "kv_transfer_params",
    "ec_transfer_params",  # the same for the encoder cache
    "priority",  # lower goes first: one client before all others (SGLang: likewise)
    "request_id",  # engine-wide identity; ours is made at the edge
    "prompt_embeds",  # tensors served in place of the prompt
    # SGLang, `entrypoints/openai/protocol.py`.
    "rid",  # as request_id
    "input_ids",  # token ids served in place of the messages
    "lora_path",  # an adapter other than the one the model name stands for
    "session_params",  # continues KV state held by one replica
    "routed_dp_rank",
    "data_parallel_rank",  # the older name of routed_dp_rank
    "disagg_prefill_dp_rank",
    "bootstrap_host",  # the prefill peer to pull KV from
    "bootstrap_port",
    "bootstrap_room",
    # TensorRT-LLM, `serve/openai_protocol.py`.
    "disaggregated_params",  # whose KV to take, from which host, and the state of another's request
    "prompt_token_ids",  # token ids served in place of the messages,
    "prompt_token_ids_b64",  # and the same in base64
    "lora_request",  # an adapter by its path
    "conversation_params",  # picks the data-parallel rank
    "agent_hierarchy",  # place in the queue
)
"""Top-level body fields that steer. Names as the engines read them; matching is case-sensitive, as theirs."""

STEERING_XARGS: tuple[str, ...] = (
    "kv_cache_report_mode",  # "full" re-announces blocks without a new copy: breaks copy counting
    "kv_transfer_params",  # vLLM copies vllm_xargs to where it looks for these two:
    "ec_transfer_params",  # the side door to the top-level fields
)
"""Keys of the body's `vllm_xargs` that steer; reported and allowed as `vllm_xargs.<key>`."""

STEERING_HEADERS: tuple[str, ...] = (
    "x-data-parallel-rank",  # vLLM, SGLang: picks the data-parallel engine
    "x-vllm-priority",  # vLLM: place in the queue
    "x-data-parallel-host-port",  # llm-d's sidecar forwards to the host these four name
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-kv-cache-source-host-port",
    "x-gateway-destination-endpoint",  # endpoint picker protocol: the pick itself,
    "x-gateway-destination-endpoint-subset",  # what may be picked,
    "x-gateway-destination-endpoint-served",  # and which one served; all three are the gateway's to write
    "x-session-token",  # llm-d: an encoded endpoint
    "x-envoy-original-dst-host",  # Envoy original_dst clusters connect to any address named here
    "cluster-name",  # AIGW: the Envoy cluster
    "target-pod",  # AIBrix: the destination address
    "routing-strategy",  # AIBrix: the policy
    "config-profile",  # AIBrix: a set of policies
    "x-smg-target-worker",  # SGLang gateway: the worker
    "x-smg-routing-key",  # SGLang: a key it may schedule by
)
"""Request headers, lower case, never taken from a client. Envoy removes before it sets, so the gateway
may set one of these in the same answer."""

_FIELDS = frozenset(STEERING_FIELDS)


def sanitize(body: dict[str, Any], allowed: frozenset[str]) -> tuple[str, ...]:
    """Take steering fields out of `body`, in place.

    Args:
        body: Decoded request body; edited.
        allowed: Names to leave alone: entries of `STEERING_FIELDS`, or `vllm_xargs.<key>`.

    Returns:
        The names removed, in the order of the tables above; empty if `body` is unchanged.
    """
    removed: list[str] = []
    if not _FIELDS.isdisjoint(body):
        removed += [name for name in STEERING_FIELDS if name in body and name not in allowed]
        for name in removed:
            del body[name]
    xargs = body.get("vllm_xargs")
    if type(xargs) is dict:
        for key in STEERING_XARGS:
            name = f"vllm_xargs.{key}"
            if key in xargs and name not in allowed:
                del xargs[key]
                removed.append(name)
    return tuple(removed)


def rewrite_model(body: dict[str, Any], name: str) -> bool:
    """Make `body` ask for model `name`, in place; True if it asked for another."""
    changed: bool = body.get("model") != name
    body["model"] = name
    return changed


def force_usage(body: dict[str, Any], operation: Operation) -> bool:
    """Ask for the token counts at the end of a stream, in place.

    Only streamed chat and text completions need it: elsewhere usage always comes. A client that did not
    ask gets one more chunk, with empty `choices`; the caller drops that chunk on its way back.
    `stream_options` of a wrong type is left for the engine to refuse.

    Returns:
        True if `body` changed.
    """
    if operation not in (Operation.CHAT, Operation.TEXT_COMPLETION) or body.get("stream") is not True:
        return False
    options = body.get("stream_options")
    if options is None:
        options = body["stream_options"] = {}
    if type(options) is not dict or options.get("include_usage") is True:
        return False
    options["include_usage"] = True
    return True


def encode(value: object, param: str = "body") -> bytes:
    """JSON bytes of a decoded value, object keys in the order they came.

    Integers beyond 64 bits were read as floats and come out as such; see `extproc.request.exact`.

    Args:
        value: What orjson decoded, or a part of it.
        param: The request field to name if it cannot be encoded.

    Raises:
        RouterError: INVALID_REQUEST: nested deeper than 254 levels; orjson reads 1024 but writes 254.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise RouterError(
            Reason.INVALID_REQUEST, f"{param} is nested deeper than 254 levels", param=param
        ) from None
