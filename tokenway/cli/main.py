"""The `tokenway` command. Each verb imports what it needs when it runs: `explain` and `top` start at once."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

from extproc.build_kind import build_kind
from extproc.errors import ConfigError
from extproc.observing.printable import printable
from metadata_center import signals
from metadata_center.addresses import Address, parse_port
from metadata_center.errors import MetadataError
from metadata_center.files import is_descriptor
from tokenway.cli import SERVING, streams
from tokenway.cli.admin_url import ADMIN_HELP, default_admin
from tokenway.cli.picker_flags import add_picker_flags
from tokenway.cli.pool_flags import SERVE_WORDS, add_pool_flags, pool_settings

OWN_WORDS = ("explain", "replay")
"""Verbs whose modules read their words, with parsers that refuse what they do not know."""

MISUSED = 2
"""Exit code for words that cannot be used, as argparse has it."""

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT, as shells have it."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 misused, 130 interrupted.

    What runs until it is stopped (`serve`, `metadata-center`, `top`, `demo`) is done when Ctrl-C stops it.
    """
    streams.prepare()
    try:
        try:
            return _ended(sys.argv[1:] if argv is None else argv)
        finally:
            streams.write_out()
    except BrokenPipeError:  # `tokenway bootstrap ... | head`: no process reads on
        streams.give_up()
    except OSError as error:
        print(printable(f"tokenway: standard output: {_said(error)}"), file=sys.stderr)
    return 1


def _ended(words: list[str]) -> int:
    """The exit code, once what keeps a verb from its work is said."""
    if not words:
        _parser().print_help(sys.stderr)
        return MISUSED
    options = _options(words)
    try:
        return _run(options)
    except ConfigError as error:
        for problem in error.problems:
            print(printable(f"{error.path}: {problem}"), file=sys.stderr)
        if error.path == SERVE_WORDS:
            return MISUSED
    except BrokenPipeError:
        raise
    except (OSError, MetadataError) as error:  # a port in use, a name that does not resolve, no Envoy
        print(printable(f"tokenway: {_said(error)}"), file=sys.stderr)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 1


def _said(error: Exception) -> str:
    """An error in words, without the number that the system has for it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", str(error))


def _options(words: list[str]) -> argparse.Namespace:
    """The words as settings; those after a verb that reads its own are left to it."""
    verb = words[0]
    if verb in OWN_WORDS:
        return argparse.Namespace(command=verb, words=words[1:])
    return (_worker_parser() if verb == "worker" else _parser()).parse_args(words)


def _run(options: argparse.Namespace) -> int:
    if options.command in SERVING:  # of words that are not the process's own
        signals.hold_back()
    match options.command:
        case "serve":
            return _serve(options)
        case "worker":
            return _serve_worker(options)
        case "check":
            from tokenway.cli.check import check

            return check(options.file, print_effective=options.print_effective)
        case "bootstrap":
            from tokenway.cli.bootstrap import bootstrap

            return bootstrap(options.config, options.listen, options.envoy_admin_port, options.sds)
        case "render":
            from tokenway.cli.render import render_istio

            return render_istio(options.config, options.out)
        case "top":
            from tokenway.cli.top import top

            return top(options.admin, once=options.once, interval_s=options.interval, as_json=options.json)
        case "explain":
            from tokenway.cli.explain import explain

            return explain(options.words)
        case "metadata-center":
            return _metadata_center(options)
        case "replay":
            from tokenway.cli.replay import replay

            return replay(options.words)
        case _:
            from tokenway.cli.demo import demo

            return demo(
                options.config,
                options.listen,
                options.envoy_admin_port,
                options.time_scale,
                default_admin=default_admin(),
            )


def _serve_worker(options: argparse.Namespace) -> int:
    from extproc.server.envoys.cluster_encoder import ClusterEncoder

    with ClusterEncoder() as encoder:  # its process imports what it needs while this one imports the rest
        from tokenway.cli.serve import serve_worker

        return serve_worker(
            options.config, options.index, json.loads(options.settings), encoder, options.counters
        )


def _serve(options: argparse.Namespace) -> int:
    pods = pool_settings(options)
    if options.config is None and not pods:
        problem = "accepted: a tokenway.yaml, a clusters.json, --pool-name or --endpoint-selector"
        raise ConfigError(SERVE_WORDS, [problem])
    from extproc.server.envoys.cluster_encoder import ClusterEncoder

    with ClusterEncoder() as encoder:  # as above
        from extproc.server.envoys.bootstrap import shipped
        from tokenway.cli.picker_flags import picker_settings
        from tokenway.cli.serve import serve

        settings = {**picker_settings(options, is_wanted=options.config is None), **pods}
        return serve(options.config or shipped("etc/picker.yaml"), settings, encoder)


def _metadata_center(options: argparse.Namespace) -> int:
    import logging

    from extproc.observing.log_writer import log_handler
    from extproc.observing.noise import AcceptFaults, is_news
    from extproc.observing.request_log import JsonFormatter
    from metadata_center.service.serve import serve

    handler = log_handler()
    handler.setFormatter(JsonFormatter())
    handler.addFilter(is_news)
    handler.addFilter(AcceptFaults(time.monotonic))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    return serve(
        options.listen,
        token_env=options.token_env,
        request_expiry_s=options.request_expiry_s,
        cache_expiry_s=options.cache_expiry_s,
    )


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            print(f"tokenway {version('tokenway')} ({build_kind()})")
        except PackageNotFoundError:
            print("tokenway, from a source tree that is not installed")
        parser.exit()


def _checked(parse: Callable[[str], object]) -> Callable[[str], str]:
    """For argparse: the word itself once `parse` takes it; what `parse` says against it is the error."""

    def read(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return read


def _file_or_pipe(text: str) -> Path:
    """For what is read once: `-` is standard input."""
    return Path("/dev/stdin" if text == "-" else text)


def _watched_file(text: str) -> Path:
    """For what is read again when it changes, of which a pipe is not capable."""
    path = Path(text)
    if text == "-" or (is_descriptor(path) and path.is_fifo()):
        raise argparse.ArgumentTypeError(
            f"`{text}` is a pipe; accepted: a file, which is read again when it changes"
        )
    return path


def _clients_address(text: str) -> str:
    from tokenway.cli.bootstrap import listen_address

    return _checked(listen_address)(text)


def _port(text: str) -> int:
    return int(_checked(parse_port)(text))


def _positive(text: str) -> float:
    """Seconds, or a factor."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"`{text}` is no number above 0")
    return value


def _worker_parser() -> argparse.ArgumentParser:
    """For the processes that `serve` starts: no verb for people, so the other parser does not know it."""
    parser = argparse.ArgumentParser(prog="tokenway")
    parser.add_argument("command")
    parser.add_argument("config", type=Path)
    parser.add_argument("index", type=int)
    parser.add_argument("settings", nargs="?", default="{}", help="JSON that goes before the configuration")
    parser.add_argument("counters", nargs="?", type=int, help="descriptor of the shared counters")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tokenway", description="Every LLM request to the right replica.")
    parser.add_argument("--version", action=_ShowVersion, help="show the version and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    serve.add_argument(
        "config",
        type=_watched_file,
        nargs="?",
        help="tokenway.yaml, or a clusters.json for defaults in all the rest; none if flags say the pods",
    )
    add_picker_flags(serve)
    add_pool_flags(serve)

    checking = commands.add_parser("check", help="say whether a configuration is usable")
    checking.add_argument(
        "file", type=_file_or_pipe, help="tokenway.yaml or clusters.json; - reads the first from a pipe"
    )
    checking.add_argument("--print-effective", action="store_true", help="print it with every default")

    envoy = _envoy_parser()
    rendering = commands.add_parser(
        "bootstrap", parents=[envoy], help="print Envoy's bootstrap for a configuration"
    )
    rendering.add_argument(
        "config", type=_file_or_pipe, help="tokenway.yaml or clusters.json; - as for check"
    )
    rendering.add_argument(
        "--sds",
        type=Path,
        metavar="FOLDER",
        help="write files there by which Envoy follows its certificates; without it Envoy reads them once",
    )

    _add_render(commands)
    commands.add_parser("explain", help="why a request went where it went")
    _add_top(commands)
    _add_metadata_center(commands)
    commands.add_parser("replay", help="a trace through a simulated fleet, policy by policy")

    showing = commands.add_parser(
        "demo", parents=[envoy], help="Envoy, three simulated engines and the gateway, at once"
    )
    showing.add_argument(
        "--config",
        type=_watched_file,
        metavar="FILE",
        help="tokenway.yaml or clusters.json with all endpoints at 127.0.0.1 (default: a copy of the sample)",
    )
    showing.add_argument(
        "--time-scale",
        type=_positive,
        default=1.0,
        metavar="FACTOR",
        help="of the engines; 2 is half as fast (default %(default)g)",
    )
    return parser


def _envoy_parser() -> argparse.ArgumentParser:
    """Where Envoy listens, for the verbs that render its bootstrap."""
    envoy = argparse.ArgumentParser(add_help=False)
    envoy.add_argument(
        "--listen",
        type=_clients_address,
        default="127.0.0.1:10000",
        metavar="IP:PORT",
        help="for clients (default %(default)s; IPv6 in brackets)",
    )
    envoy.add_argument(
        "--envoy-admin-port",
        type=_port,
        default=15000,
        metavar="PORT",
        help="Envoy's own admin surface, on loopback (default %(default)s)",
    )
    return envoy


def _add_render(commands: Any) -> None:
    rendering = commands.add_parser("render", help="print what a foreign gateway is configured by")
    gateways = rendering.add_subparsers(dest="gateway", required=True, metavar="GATEWAY")
    istio = gateways.add_parser(
        "istio", help="resources that make an Istio gateway's Envoy do what ours does"
    )
    istio.add_argument(
        "--config", type=_file_or_pipe, required=True, metavar="FILE", help="tokenway.yaml; - reads a pipe"
    )
    istio.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write one file for each kind of them there, not all to standard output",
    )


def _add_top(commands: Any) -> None:
    watching = commands.add_parser("top", help="live endpoints")
    watching.add_argument(
        "--admin",
        default=default_admin(),
        metavar="URL",
        help=ADMIN_HELP,
    )
    watching.add_argument("--once", action="store_true", help="print one table and leave")
    watching.add_argument(
        "--interval",
        type=_positive,
        default=1.0,
        metavar="SECONDS",
        help="between tables (default %(default)g)",
    )
    watching.add_argument("--json", action="store_true", help="the gateway's JSON instead of the table")


def _add_metadata_center(commands: Any) -> None:
    center = commands.add_parser(
        "metadata-center", help="run a metadata center for gateways, AIGW's too, over HTTP, in memory"
    )
    center.add_argument(
        "--listen",
        type=_checked(Address.parse),
        default="127.0.0.1:8080",
        metavar="IP:PORT",
        help="default %(default)s; IPv6 in brackets, port 0 for any",
    )
    center.add_argument("--token-env", metavar="NAME", help="variable that holds the bearer token to require")
    center.add_argument(
        "--request-expiry-s",
        type=_positive,
        default=660.0,
        metavar="SECONDS",
        help="a request without a delete for so long is taken for lost (default %(default)g)",
    )
    center.add_argument(
        "--cache-expiry-s",
        type=_positive,
        default=3600.0,
        metavar="SECONDS",
        help="a prompt without a save for so long is taken for evicted (default %(default)g)",
    )


if __name__ == "__main__":
    sys.exit(main())
