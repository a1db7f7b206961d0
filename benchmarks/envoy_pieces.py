"""What each piece of the shipped bootstrap costs Envoy, by leaving it out in turn.

    make bench-envoy             (python -m benchmarks.envoy_pieces [--rounds 6] [--only 'PIECE;...'])

An Envoy for each piece, all before one bare servicer (`benchmarks.floor`) and the same engines, take turns
within each round, in an order that is turned by one from round to round. What is measured is the Envoy
process's time on a processor per request (`/proc/<pid>/schedstat`): JSON of 4 KB, and streams of 200 events,
each in a packet of its own. Shown are the least over rounds, which other work on the machine disturbs least,
and what the piece costs: the median over rounds of what is shipped less what is without it, with the
quartiles of that difference. Where these lie on both sides of 0 the piece costs less than can be measured.

With `--bootstrap` further files take part, to compare a change with what is shipped in one run; the last
figure is then what they save. `--sizes` measures JSON of other sizes instead, in bytes by comma.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks import processes
from benchmarks.setups import CLUSTER, ENVOY, FLOORS, envoy_config, python_module, serves
from benchmarks.traffic import Target, closed_loop, requests
from testbed.processes import free_port

Document = dict[str, Any]

SHIPPED: Final = "as shipped"
ENGINES: Final = 3
CONNECTIONS: Final = 4
TOKENS: Final = 200
PROMPT_BYTES: Final = 4096
WARM_UP_S: Final = 0.1
LAST_LOGS_S: Final = 0.03
"""From the last answer until its access-log entry has left."""


def manager(document: Document) -> Document:
    """The HTTP connection manager of a bootstrap."""
    chain = document["static_resources"]["listeners"][0]["filter_chains"][0]
    found: Document = chain["filters"][0]["typed_config"]
    return found


def http_filter(document: Document, name: str) -> Document:
    """The settings of one of its HTTP filters."""
    return next(each["typed_config"] for each in manager(document)["http_filters"] if each["name"] == name)


def without_filters(*names: str) -> Callable[[Document], None]:
    """Leaves out HTTP filters."""

    def leave_out(document: Document) -> None:
        of = manager(document)
        of["http_filters"] = [each for each in of["http_filters"] if each["name"] not in names]

    return leave_out


def without_settings(*names: str) -> Callable[[Document], None]:
    """Leaves out settings of the connection manager."""

    def leave_out(document: Document) -> None:
        for name in names:
            del manager(document)[name]

    return leave_out


def _router(document: Document) -> Document:
    return http_filter(document, "envoy.filters.http.router")


def _without_logs(document: Document) -> None:
    del manager(document)["access_log"]
    del _router(document)["upstream_log"]


def _without_upstream_log(document: Document) -> None:
    del _router(document)["upstream_log"]


def _common(log: Document) -> Document:
    found: Document = log["typed_config"]["common_config"]
    return found


def _without_tags(document: Document) -> None:
    for log in (*manager(document)["access_log"], *_router(document)["upstream_log"]):
        del _common(log)["custom_tags"]


def _without_removals(document: Document) -> None:
    config = manager(document)["early_header_mutation_extensions"][0]["typed_config"]
    config["mutations"] = [each for each in config["mutations"] if "remove" not in each]


def _without_engine_removals(document: Document) -> None:
    del manager(document)["route_config"]["virtual_hosts"][0]["request_headers_to_remove"]


def _without_cel(document: Document) -> None:
    mappers = manager(document)["local_reply_config"]["mappers"]
    manager(document)["local_reply_config"]["mappers"] = [
        each for each in mappers if "cel" not in json.dumps(each)
    ]


def _without_fallback_matcher(document: Document) -> None:
    for each in manager(document)["http_filters"]:
        if each["name"] == "tokenway.fallback":
            each["typed_config"] = each["typed_config"]["extension_config"]["typed_config"]


def _without_forward_rules(document: Document) -> None:
    del http_filter(document, "tokenway.ext_proc")["forward_rules"]


def _without_processor_retries(document: Document) -> None:
    del http_filter(document, "tokenway.ext_proc")["grpc_service"]["retry_policy"]


def _without_path_rules(document: Document) -> None:
    without_settings("normalize_path", "merge_slashes", "path_with_escaped_slashes_action")(document)


def _without_overload_manager(document: Document) -> None:
    del document["overload_manager"]


def _without_statistics(document: Document) -> None:
    document["stats_config"] = {"stats_matcher": {"reject_all": True}}


def _usage_script(script: str) -> Callable[[Document], None]:
    def replace(document: Document) -> None:
        http_filter(document, "tokenway.usage")["default_source_code"] = {"inline_string": script}

    return replace


def _buffering_alone(document: Document) -> None:
    _router_alone(document)
    kind = "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer"
    buffer = {"name": "buffer", "typed_config": {"@type": kind, "max_request_bytes": 33_554_432}}
    manager(document)["http_filters"].insert(0, buffer)


def _router_alone(document: Document) -> None:
    _without_logs(document)
    of = manager(document)
    of["http_filters"] = of["http_filters"][-1:]


PIECES: Final[Mapping[str, Callable[[Document], None]]] = {
    "ext_proc, with its fallback": without_filters("tokenway.ext_proc", "tokenway.fallback"),
    "usage and errors of answers": without_filters("tokenway.usage"),
    "of that, all but an empty loop": _usage_script(
        "function envoy_on_response(answer) for chunk in answer:bodyChunks() do end end"
    ),
    "of that, all but a copy of each chunk": _usage_script(
        "function envoy_on_response(answer) local last\n"
        "for chunk in answer:bodyChunks() do last = chunk:getBytes(0, chunk:length()) end end"
    ),
    "access logs": _without_logs,
    "upstream log": _without_upstream_log,
    "tags of access logs": _without_tags,
    "removals of clients' headers": _without_removals,
    "removals towards engines": _without_engine_removals,
    "local replies": without_settings("local_reply_config"),
    "of that, CEL": _without_cel,
    "headers of answers": without_filters("tokenway.answer_headers"),
    "matcher before the fallback": _without_fallback_matcher,
    "rules of what is forwarded": _without_forward_rules,
    "ext_proc's retries": _without_processor_retries,
    "path rules": _without_path_rules,
    "overload manager": _without_overload_manager,
    "statistics": _without_statistics,
    "all but the router": _router_alone,
    "all but the router and a buffer": _buffering_alone,
}
"""What is left out, by name."""


@dataclass(frozen=True, slots=True)
class Variant(Target):
    """An Envoy that runs.

    Attributes:
        pid: Its process.
    """

    pid: int


@dataclass(frozen=True, slots=True)
class Phase:
    """What is sent.

    Attributes:
        name: For reports.
        messages: In turn.
    """

    name: str
    messages: Sequence[bytes]


def phases(sizes: Sequence[int]) -> tuple[Phase, ...]:
    """JSON and streams; JSON alone where sizes are given."""
    if sizes:
        return tuple(Phase(f"JSON of {size:,} bytes", requests(8, size)) for size in sizes)
    return (
        Phase("JSON of 4 KB", requests(64, PROMPT_BYTES)),
        Phase(f"stream of {TOKENS}", requests(64, PROMPT_BYTES, stream_tokens=TOKENS)),
    )


async def start(stack: ExitStack, name: str, document: Document, root: Path) -> Variant:
    """An Envoy with a bootstrap, killed at the end.

    Raises:
        TimeoutError: It does not start.
    """
    port = document["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"]
    path = root / f"envoy{port}.yaml"
    path.write_text(yaml.safe_dump(document))
    options = ("--concurrency", "1", "--use-dynamic-base-id", "-l", "off")
    pid = stack.enter_context(processes.running(str(ENVOY), "-c", str(path), *options))
    await processes.until(lambda: serves(port), f"envoy without {name}")
    return Variant(name, port, pid)


async def floor(stack: ExitStack, root: Path) -> tuple[Path, list[int]]:
    """A bare servicer and the engines, killed at the end; its socket, and their ports.

    Raises:
        TimeoutError: The servicer does not start.
    """
    engines, socket = [free_port() for _ in range(ENGINES)], root / "floor.sock"
    stack.enter_context(python_module("benchmarks.traffic", "--apart", "127.0.0.1", *map(str, engines)))
    keys = [f"127.0.0.1:{engine}" for engine in engines]
    options = ("--first-chunk", FLOORS["floor"], str(socket), CLUSTER, *keys)
    stack.enter_context(python_module("benchmarks.floor", *options))
    await processes.until(lambda: asyncio.to_thread(socket.exists), "floor")
    return socket, engines


async def by_turns(
    variants: Sequence[Variant], sent: Sequence[Phase], rounds: int, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """CPU per request of each variant, phase and round, µs; each round begins with another variant."""
    found: dict[str, dict[str, list[float]]] = {
        variant.name: {phase.name: [] for phase in sent} for variant in variants
    }
    for number in range(rounds):
        turn = number % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):
            for phase in sent:
                found[variant.name][phase.name].append(await used_us(variant, phase, seconds))
    return found


async def used_us(variant: Variant, phase: Phase, seconds: float) -> float:
    """CPU of one phase, per request."""
    messages = list(phase.messages)
    await closed_loop(variant, messages, CONNECTIONS, WARM_UP_S)
    before_s = processes.on_cpu_s([variant.pid])
    done = len(await closed_loop(variant, messages, CONNECTIONS, seconds))
    await asyncio.sleep(LAST_LOGS_S)
    return (processes.on_cpu_s([variant.pid]) - before_s) / done * 1e6


def table(found: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> str:
    """Figures in Markdown, dearest piece of the first phase first.

    Args:
        found: By variant, by phase: µs per request of each round; `SHIPPED` among them.
        names: Of the phases.
    """

    def differences(name: str, phase: str) -> list[float]:
        return [
            shipped - without
            for shipped, without in zip(found[SHIPPED][phase], found[name][phase], strict=True)
        ]

    def cell(name: str, phase: str) -> str:
        least = f"{min(found[name][phase]):,.0f}"
        if name == SHIPPED:
            return f"{least} |"
        low, middle, high = statistics.quantiles(differences(name, phase), n=4, method="inclusive")
        return f"{least} | {middle:+,.0f} ({low:+,.0f}..{high:+,.0f})"

    ordered = sorted(
        (name for name in found if name != SHIPPED),
        key=lambda name: -statistics.median(differences(name, names[0])),
    )
    head = " | ".join(f"{name}: least µs | costs (quartiles)" for name in names)
    lines = [f"| without | {head} |", "|---" * (1 + 2 * len(names)) + "|"]
    lines += [
        f"| {name} | {' | '.join(cell(name, each) for each in names)} |" for name in (SHIPPED, *ordered)
    ]
    return "\n".join(lines)


async def measure(
    pieces: Mapping[str, Callable[[Document], None]],
    others: Mapping[str, Path],
    sent: Sequence[Phase],
    seconds: float,
    rounds: int,
) -> dict[str, dict[str, list[float]]]:
    """µs per request of each round, by variant and phase.

    Args:
        pieces: What is left out, by name.
        others: Bootstraps that take part besides, by name.
        sent: The phases.
        seconds: Per phase.
        rounds: How often all take their turn; at least two.

    Raises:
        TimeoutError: Something does not start.
    """
    with tempfile.TemporaryDirectory(prefix="twe", dir="/tmp") as folder, ExitStack() as stack:
        root = Path(folder)
        socket, engines = await floor(stack, root)
        variants = []
        for name, leave_out in {SHIPPED: lambda _: None, **pieces}.items():
            document = yaml.safe_load(envoy_config("floor", free_port(), free_port(), str(socket), engines))
            leave_out(document)
            variants.append(await start(stack, name, document, root))
        for name, path in others.items():
            template = yaml.safe_load(path.read_text(encoding="utf-8"))
            text = envoy_config("floor", free_port(), free_port(), str(socket), engines, template=template)
            variants.append(await start(stack, name, yaml.safe_load(text), root))
        return await by_turns(variants, sent, rounds, seconds)


def add_turns(parser: argparse.ArgumentParser) -> None:
    """The options of `by_turns`."""
    parser.add_argument("--rounds", type=_rounds, default=6, help="at least 2 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="per phase (default: %(default)s)")


def _rounds(text: str) -> int:
    rounds = int(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError("at least 2: quartiles are shown")
    return rounds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.envoy_pieces",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_turns(parser)
    parser.add_argument("--only", help=f"pieces by semicolon; none for an empty one; of {'; '.join(PIECES)}")
    parser.add_argument("--bootstrap", type=Path, nargs="+", default=[], help="files that take part besides")
    parser.add_argument("--sizes", default="", help="bytes of prompts of JSON requests, by comma")
    options = parser.parse_args()
    names = list(PIECES) if options.only is None else [name for name in options.only.split(";") if name]
    if set(names) - set(PIECES):
        parser.error(f"no piece is called {', '.join(sorted(set(names) - set(PIECES)))}")
    sent = phases([int(size) for size in options.sizes.split(",") if size])
    others = {path.name: path for path in options.bootstrap}
    pieces = {name: PIECES[name] for name in names}
    found = asyncio.run(measure(pieces, others, sent, options.seconds, options.rounds))
    print(
        f"{json.dumps(processes.machine())}\n\n{table(found, [phase.name for phase in sent])}\n", flush=True
    )
    print(
        json.dumps(
            {
                name: {of: [round(us, 1) for us in all_us] for of, all_us in by.items()}
                for name, by in found.items()
            }
        )
    )


if __name__ == "__main__":
    main()
