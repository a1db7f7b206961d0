"""The `tokenway` command. Each verb imports what it needs when it runs: `explain` and `top` start at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from extproc.errors import ConfigError
from extproc.observing.printable import printable
from metadata_center.errors import MetadataError

ADMIN_ENV = "TOKENWAY_ADMIN"
DEFAULT_ADMIN = "http://127.0.0.1:10080"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 misused."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command not in ("explain", "replay"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _run(options, rest)
    except ConfigError as error:
        for problem in error.problems:
            print(printable(f"{error.path}: {problem}"), file=sys.stderr)
    except (OSError, MetadataError) as error:  # a port in use, a name that does not resolve, no Envoy
        print(printable(f"tokenway: {error}"), file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command in ("serve", "worker", "metadata-center"):
        # SIGHUP means "reload" to these, but kills who has no handler yet; imports alone take a second.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    match options.command:
        case "serve":
            from extproc.cli.serve import serve

            return serve(options.config)
        case "worker":
            from extproc.cli.serve import serve_worker

            return serve_worker(options.config, options.index)
        case "check":
            from extproc.cli.check import check

            return check(options.file, print_effective=options.print_effective)
        case "bootstrap":
            from extproc.cli.bootstrap import bootstrap

            return bootstrap(options.config, options.listen, options.envoy_admin_port)
        case "top":
            from extproc.cli.top import top

            return top(options.admin, once=options.once, interval_s=options.interval, as_json=options.json)
        case "explain":
            from extproc.cli.explain import explain

            return explain(rest, options.admin)
        case "metadata-center":
            return _metadata_center(options)
        case "replay":
            from extproc.cli.replay import replay

            return replay(rest)
        case _:
            from extproc.cli.demo import demo

            return demo(options.config, options.listen, options.envoy_admin_port, options.time_scale)


def _metadata_center(options: argparse.Namespace) -> int:
    import logging

    from extproc.observing.request_log import JsonFormatter
    from metadata_center.serve import serve

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    return serve(
        options.listen,
        token_env=options.token_env,
        request_expiry_s=options.request_expiry_s,
        cache_expiry_s=options.cache_expiry_s,
    )


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

    envoy = argparse.ArgumentParser(add_help=False)
    envoy.add_argument("--listen", default="127.0.0.1:10000", metavar="IP:PORT", help="for clients")
    envoy.add_argument("--envoy-admin-port", type=int, default=15000, metavar="PORT")
    rendering = commands.add_parser(
        "bootstrap", parents=[envoy], help="print Envoy's bootstrap for a configuration"
    )
    rendering.add_argument("config", type=Path)

    admin = argparse.ArgumentParser(add_help=False)
    admin.add_argument(
        "--admin",
        default=os.environ.get(ADMIN_ENV, DEFAULT_ADMIN),
        metavar="URL",
        help=f"the gateway's admin port (default {DEFAULT_ADMIN}, or ${ADMIN_ENV})",
    )
    commands.add_parser("explain", parents=[admin], add_help=False, help="why a request went where it went")
    watching = commands.add_parser("top", parents=[admin], help="live endpoints")
    watching.add_argument("--once", action="store_true", help="print one table and leave")
    watching.add_argument("--interval", type=float, default=1.0, metavar="SECONDS")
    watching.add_argument("--json", action="store_true")

    center = commands.add_parser(
        "metadata-center", help="run a metadata center for AIGW gateways, over HTTP, in memory"
    )
    center.add_argument("--listen", default="127.0.0.1:8080", metavar="IP:PORT")
    center.add_argument("--token-env", metavar="NAME", help="variable that holds the bearer token to require")
    center.add_argument(
        "--request-expiry-s",
        type=float,
        default=660.0,
        metavar="SECONDS",
        help="a request nobody deleted for so long is taken for lost (default 660)",
    )
    center.add_argument(
        "--cache-expiry-s",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="a prompt nobody saved for so long is taken for evicted (default 3600)",
    )

    commands.add_parser("replay", add_help=False, help="a trace through a simulated fleet, policy by policy")

    showing = commands.add_parser(
        "demo", parents=[envoy], help="Envoy, three simulated engines and the gateway, at once"
    )
    showing.add_argument("--config", type=Path, help="tokenway.yaml (default: the shipped sample)")
    showing.add_argument("--time-scale", type=float, default=1.0, help="of the engines; 2 is half as fast")
    return parser


if __name__ == "__main__":
    sys.exit(main())
