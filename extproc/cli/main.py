"""The `tokenway` command."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from pathlib import Path

from extproc.cli.check import check
from extproc.cli.explain import explain
from extproc.cli.top import top
from extproc.config.loading import load_all
from extproc.discovery.resolve import ResolveError
from extproc.errors import ConfigError
from extproc.observing.request_log import JsonFormatter
from extproc.server import bootstrap
from extproc.server.supervisor import Supervisor
from extproc.server.worker import Worker, socket_path

GC_THRESHOLD = 50_000
"""Allocations between collections of the youngest objects; the default, 700, collects twice per request."""

ADMIN_ENV = "TOKENWAY_ADMIN"
DEFAULT_ADMIN = "http://127.0.0.1:10080"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 misused."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "explain":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match options.command:
            case "serve":
                return _serve(options.config)
            case "worker":
                return _run(Worker(options.config, index=options.index, supervised=True))
            case "check":
                return check(options.file, print_effective=options.print_effective)
            case "bootstrap":
                return _bootstrap(options)
            case "top":
                return top(
                    options.admin, once=options.once, interval_s=options.interval, as_json=options.json
                )
            case "explain":
                return explain(rest, options.admin)
            case _:
                from extproc.cli.demo import demo

                return demo(options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"{error.path}: {problem}", file=sys.stderr)
        return 1
    except (ResolveError, OSError) as error:
        print(f"tokenway: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenway", description="Every LLM request to the right replica.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    serve.add_argument(
        "config", type=Path, help="tokenway.yaml, or a clusters.json for defaults in all the rest"
    )

    worker = commands.add_parser("worker", help=argparse.SUPPRESS)
    worker.add_argument("config", type=Path)
    worker.add_argument("index", type=int)

    checking = commands.add_parser("check", help="say whether a configuration is usable")
    checking.add_argument("file", type=Path)
    checking.add_argument("--print-effective", action="store_true", help="print it with every default")

    rendering = commands.add_parser("bootstrap", help="print Envoy's bootstrap for a configuration")
    rendering.add_argument("config", type=Path)
    rendering.add_argument("--listen", default="127.0.0.1:10000", metavar="IP:PORT", help="for clients")
    rendering.add_argument("--envoy-admin-port", type=int, default=15000, metavar="PORT")

    admin = argparse.ArgumentParser(add_help=False)
    admin.add_argument(
        "--admin",
        default=os.environ.get(ADMIN_ENV, DEFAULT_ADMIN),
        metavar="URL",
        help=f"the gateway's admin port (default {DEFAULT_ADMIN}, or ${ADMIN_ENV})",
    )
    commands.add_parser(
        "explain", parents=[admin], add_help=False, help="why a request went where it went"
    )
    watching = commands.add_parser("top", parents=[admin], help="live endpoints")
    watching.add_argument("--once", action="store_true", help="print one table and leave")
    watching.add_argument("--interval", type=float, default=1.0, metavar="SECONDS")
    watching.add_argument("--json", action="store_true")

    showing = commands.add_parser("demo", help="Envoy, three simulated engines and the gateway, at once")
    showing.add_argument("--config", type=Path, default=bootstrap.shipped("etc/tokenway.yaml"))
    showing.add_argument("--listen", default="127.0.0.1:10000", metavar="IP:PORT")
    showing.add_argument("--envoy-admin-port", type=int, default=15000, metavar="PORT")
    showing.add_argument("--time-scale", type=float, default=1.0, help="of the engines; 2 is half as fast")
    return parser


def _serve(path: Path) -> int:
    config, _ = load_all(path)
    return _run(Supervisor(path) if config.server.workers > 1 else Worker(path))


def _run(server: Worker | Supervisor) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    asyncio.run(run_until_signalled(server))
    return 0


async def run_until_signalled(server: Worker | Supervisor) -> None:
    """Start, wait for SIGTERM or SIGINT, stop."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    # What was built so far lives until the end: no collection need look at it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    await stopping.wait()
    await server.stop()


def _bootstrap(options: argparse.Namespace) -> int:
    config, _ = load_all(options.config)
    host, _, port = options.listen.rpartition(":")
    run_dir = Path(config.server.run_dir)
    print(
        bootstrap.render(
            bootstrap.template(),
            listen=(host.strip("[]"), int(port)),
            admin_port=options.envoy_admin_port,
            sockets=[str(socket_path(run_dir, index)) for index in range(config.server.workers)],
            allow_headers=config.request.allow_headers,
            max_body_bytes=config.request.max_body_bytes,
        ),
        end="",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
