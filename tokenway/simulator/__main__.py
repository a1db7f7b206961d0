"""`python -m tokenway.simulator`: one simulated replica in one process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer
from tokenway.simulator.server.settings import (
    DEFAULT_BUFFER_STEPS,
    DEFAULT_MAX_MODEL_LEN,
    KvEventsConfig,
    ServerSettings,
)


def parse_settings(argv: list[str]) -> ServerSettings:
    """Settings from command-line words; exits with a message if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenway.simulator", description="A vLLM look-alike without a GPU."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0 for any")
    add("--model", action="append", help="name to answer to; repeat for aliases (default: sim)")
    add("--profile", choices=sorted(PROFILES), default="demo")
    add("--time-scale", type=float, default=1.0, help="real seconds per simulated second")
    add("--max-model-len", type=int, default=DEFAULT_MAX_MODEL_LEN)
    add("--engine-id", type=int, default=0, help="data parallel rank")
    add("--block-size", type=int, help="tokens per KV block")
    add("--kv-tokens", type=int, help="KV cache capacity")
    add("--max-num-queued-reqs", type=int)
    add("--max-num-queued-tokens", type=int)
    add(
        "--kv-events", metavar="ENDPOINT", help="publish KV events; connects unless the address is a wildcard"
    )
    add("--kv-events-bind", action="store_true", help="bind --kv-events whatever the address")
    add("--kv-replay", metavar="ENDPOINT", help="answer replay requests for KV events here")
    add("--kv-topic", default="")
    add("--kv-buffer-steps", type=int, default=DEFAULT_BUFFER_STEPS, help="batches kept for replay")
    add("--sse-keep-alive", type=float, metavar="SECONDS", help="send comments until the first token")
    add("--enable-request-id-headers", action="store_true", help="echo X-Request-Id")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of a byte-level BPE for completions")
    args = parser.parse_args(argv)
    if args.kv_events is None and (args.kv_replay is not None or args.kv_events_bind or args.kv_topic):
        parser.error("--kv-replay, --kv-events-bind and --kv-topic need --kv-events")
    kv_events = args.kv_events and KvEventsConfig(
        args.kv_events, args.kv_replay, args.kv_topic, args.kv_events_bind, args.kv_buffer_steps
    )
    overrides = {
        name: getattr(args, name)
        for name in ("block_size", "kv_tokens", "max_num_queued_reqs", "max_num_queued_tokens")
        if getattr(args, name) is not None
    }
    try:
        return ServerSettings(
            models=tuple(args.model or ("sim",)),
            profile=replace(PROFILES[args.profile], **overrides),
            time_scale=args.time_scale,
            host=args.host,
            port=args.port,
            max_model_len=args.max_model_len,
            engine_id=args.engine_id,
            kv_events=kv_events,
            sse_keep_alive_s=args.sse_keep_alive,
            request_id_headers=args.enable_request_id_headers,
            tokenizer=args.tokenizer,
        )
    except ValueError as error:
        parser.error(str(error))


async def serve(settings: ServerSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = SimulatorServer(settings)
    await server.start()
    print(f"listening on {server.url}", flush=True)
    await stopping.wait()
    await server.stop()


if __name__ == "__main__":
    asyncio.run(serve(parse_settings(sys.argv[1:])))
