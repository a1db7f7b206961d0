"""What an Istio gateway's configuration costs Envoy, beside our own bootstrap's.

    make bench-istio             (python -m benchmarks.istio_profile [--rounds 6])

The same Envoy twice, before one bare servicer (`benchmarks.floor`) and the same engines: with the shipped
bootstrap, and with what `tokenway render istio` prints, put together as istiod would; and again with one
script of it left out in turn. Measured as `benchmarks.envoy_pieces` does: the Envoy process's time on a
processor per request, JSON of 4 KB and streams of 200 events in packets of their own, set-ups taking turns.
The servicer names no cluster by header, so the route of what was decided names it: that look-up is left out.
With `TOKENWAY_ENVOY` naming an Envoy that cannot load the bootstrap, `--profile-only` measures the rest.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import yaml

from benchmarks import processes
from benchmarks.envoy_pieces import Document, add_turns, by_turns, floor, phases, start, without_filters
from benchmarks.setups import CLUSTER, envoy_config
from benchmarks.traffic import MODEL
from testbed.assembled import assembled
from testbed.processes import free_port
from tokenway.cli.render import rendered

BOOTSTRAP: Final = "our bootstrap"
PROFILE: Final = "for an Istio gateway"
WITHOUT: Final = {
    f"{PROFILE}, without {words}": name
    for words, name in (
        ("the script of usage", "tokenway.usage"),
        ("the script of answers", "tokenway.answer"),
        ("the script of requests without Tokenway", "tokenway.fallback"),
    )
}
_MESH: Final = f"outbound|8000||{CLUSTER}.models.internal"


def of_istio(root: Path, socket: str, engines: Sequence[int]) -> Document:
    """Envoy's configuration from what is rendered, on ports of its own."""
    config = {
        "version": 1,
        "server": {"run_dir": str(root)},
        "istio_gateway": {},
        "models": {MODEL: {"rules": [{"cluster": _MESH}]}},
    }
    path = root / "tokenway.yaml"
    path.write_text(yaml.safe_dump(config))
    (root / "clusters.json").write_text('{"clusters": []}')
    document: Document = assembled(
        [manifest for manifests in rendered(path).values() for manifest in manifests],
        port=free_port(),
        admin_port=free_port(),
        endpoints={_MESH: [("127.0.0.1", engine) for engine in engines]},
        sockets=[socket],
    )
    chain = document["static_resources"]["listeners"][0]["filter_chains"][0]
    (host,) = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    for route in host["routes"]:
        if route.get("route", {}).pop("cluster_header", None) is not None:
            route["route"]["cluster"] = _MESH
    return document


async def measure(
    seconds: float, rounds: int, *, is_profile_alone: bool
) -> dict[str, dict[str, list[float]]]:
    """µs per request of each round, by set-up and phase.

    Args:
        seconds: Per phase.
        rounds: How often all take their turn; at least two.
        is_profile_alone: Leave our bootstrap out.

    Raises:
        TimeoutError: Something does not start.
    """
    sent = phases(())
    with tempfile.TemporaryDirectory(prefix="twe", dir="/tmp") as folder, ExitStack() as stack:
        root = Path(folder)
        socket, engines = await floor(stack, root)
        variants = []
        if not is_profile_alone:
            text = envoy_config("floor", free_port(), free_port(), str(socket), engines)
            variants.append(await start(stack, BOOTSTRAP, yaml.safe_load(text), root))
        for name, left_out in {PROFILE: "", **WITHOUT}.items():
            document = of_istio(root, str(socket), engines)
            without_filters(left_out)(document)
            variants.append(await start(stack, name, document, root))
        return await by_turns(variants, sent, rounds, seconds)


def table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Figures in Markdown: the least of each, and its ratio to the first row's in the same round."""
    base = next(iter(found.values()))

    def cell(of: Mapping[str, Sequence[float]], phase: str) -> str:
        ratios = [mine / theirs for mine, theirs in zip(of[phase], base[phase], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"{min(of[phase]):,.0f} | {middle:.2f} ({low:.2f}..{high:.2f})"

    head = " | ".join(f"{phase}: least µs | ratio (quartiles)" for phase in base)
    lines = [f"| Envoy | {head} |", "|---" * (1 + 2 * len(base)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(of, phase) for phase in base)} |" for name, of in found.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.istio_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_turns(parser)
    parser.add_argument("--profile-only", action="store_true", help="leave our bootstrap out")
    options = parser.parse_args()
    found = asyncio.run(measure(options.seconds, options.rounds, is_profile_alone=options.profile_only))
    print(f"{json.dumps(processes.machine())}\n\n{table(found)}\n", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
