"""What each piece of Tokenway's own work costs where it runs: each left out in turn, behind a real Envoy.

    python -m benchmarks.pieces [--rounds N] [--seconds S] [--prompt-bytes N] [--only PIECE ...]

Each set-up is an Envoy and a Tokenway in which one piece does nothing, or hands out what it made once; all
run at once and are asked by turns. The difference to `whole` is the piece, with what it leaves in the
processor's caches: in a tight loop in one process (`benchmarks.own_work`) the same code takes less. What is
left out changes what is decided, so this shows cost and nothing else. CPU is what the scheduler says, per
request, the median of the rounds. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks import processes
from benchmarks.setups import SERVE, Setup, python_module, setup
from benchmarks.traffic import closed_loop, requests
from extproc.choosing import deciding
from extproc.choosing.least_completion import completion_costs
from extproc.choosing.teaching import Teaching
from extproc.health.evidence import HealthEvidence
from extproc.health.tracker import HealthTracker
from extproc.observing.metrics.collector import Metrics
from extproc.observing.records import RecordRing
from extproc.request.blocks import block_hashes
from extproc.request.parse import parse
from extproc.routing import parsing, scheduling
from extproc.routing.endings import Endings
from extproc.routing.looking import snapshot_of
from metadata_center.history.prefix_index import PrefixIndex
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.load.ledger import Expired
from metadata_center.load.table import LoadTable, LoadView
from testbed.processes import free_port
from tokenway.cli.serve import serve

CONCURRENCY: Final = 4
WARM_UP_S: Final = 0.3
LAST_LOGS_S: Final = 0.1


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what returns nothing."""


def _once(function: Callable[..., Any], name_of: Callable[..., Any]) -> Callable[..., Any]:
    """What was returned first for arguments of the same name."""
    made: dict[Any, Any] = {}

    def again(*arguments: Any, **named: Any) -> Any:
        name = name_of(*arguments)
        found = made.get(name)
        if found is None:
            found = made[name] = function(*arguments, **named)
        return found

    return again


def _without(owner: Any, **methods: Callable[..., Any]) -> None:
    for name, method in methods.items():
        setattr(owner, name, method)


def _no_metrics() -> None:
    counts = ("observe_decision", "observe_end", "access_log_entry", "access_log_lag", "stream_ended")
    _without(Metrics, **dict.fromkeys(counts, _nothing))


def _no_ledger() -> None:
    def view(_: LoadTable, slots: tuple[int, ...]) -> LoadView:
        return LoadView(*([0] * len(slots) for _ in range(5)))

    done = dict.fromkeys(("charge", "release", "release_prefill"), lambda *_, **__: True)
    _without(LoadTable, view=view, advance=lambda *_: Expired((), ()), **done)


def _no_health() -> None:
    _without(HealthEvidence, ended=_nothing)
    _without(HealthTracker, alive=lambda *_: ())


def _no_endings() -> None:
    def ended(self: Any, end: Any, now_s: float) -> None:
        self._running.release(end.request_id, now_s)
        self._running.finish(end.request_id, now_s, completed=True)

    _without(Endings, _ended=ended)


PIECES: Final[dict[str, Callable[[], None]]] = {
    "whole": lambda: None,
    "parsing": lambda: _without(parsing, parse=_once(parse, lambda _, body: body)),
    "blocks": lambda: _without(
        parsing, block_hashes=_once(block_hashes, lambda prompt, *_: (prompt[:64], len(prompt)))
    ),
    "history": lambda: _without(
        PrefixIndex, match=lambda _, __, keys: [0] * len(keys), record=lambda *_: 0, forget_older=_nothing
    ),
    "running": lambda: _without(RunningBlocks, match=lambda _, __, keys: [0] * len(keys), add=_nothing),
    "ledger": _no_ledger,
    "snapshot": lambda: _without(
        scheduling, snapshot_of=_once(snapshot_of, lambda _, __, found, *___: id(found.pool))
    ),
    "costs": lambda: _without(
        deciding, completion_costs=_once(completion_costs, lambda snapshot: len(snapshot.keys))
    ),
    "records": lambda: _without(RecordRing, add=_nothing),
    "metrics": _no_metrics,
    "teaching": lambda: _without(Teaching, ended=_nothing, first_token=_nothing),
    "health": _no_health,
    "endings": _no_endings,
}
"""What is left out, and how; of `endings` what follows from them, three pieces above included."""


async def measure(pieces: Sequence[str], prompt_bytes: int, seconds: float, rounds: int) -> dict[str, float]:
    """Microseconds per request without each piece.

    Args:
        pieces: Names of `PIECES`.
        prompt_bytes: Length of the prompts.
        seconds: Length of one phase.
        rounds: How often each has its turn.
    """
    engines = [free_port() for _ in range(3)]
    used_us: dict[str, list[float]] = {piece: [] for piece in pieces}
    messages = requests(64, prompt_bytes, stream_tokens=10)
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="twp", ignore_cleanup_errors=True))
        stack.enter_context(python_module("benchmarks.traffic", "127.0.0.1", *map(str, engines)))
        targets: list[Setup] = []
        for piece in pieces:
            command = ("benchmarks.pieces", "serve", piece)
            one = setup("tokenway", Path(folder), engines, first_chunk=True, serve=command)
            targets.append(await stack.enter_async_context(one))
        for _ in range(rounds):
            for target in targets:
                await closed_loop(target, messages, CONCURRENCY, WARM_UP_S)
                before_s = target.cpu_s()
                done = len(await closed_loop(target, messages, CONCURRENCY, seconds))
                await asyncio.sleep(LAST_LOGS_S)
                used_us[target.name].append((target.cpu_s() - before_s) / done * 1e6)
    return {piece: round(statistics.median(found), 1) for piece, found in used_us.items()}


def main() -> None:
    """Print the table, or serve without a piece."""
    if sys.argv[1:2] == ["serve"]:
        PIECES[sys.argv[2]]()
        sys.exit(serve(Path(sys.argv[3])))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="per phase")
    parser.add_argument("--prompt-bytes", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    options = parser.parse_args()
    pieces = list(dict.fromkeys(("whole", *options.only)))
    found = asyncio.run(measure(pieces, options.prompt_bytes, options.seconds, options.rounds))
    for piece, used_us in found.items():
        print(f"without {piece}: {used_us} us, {found['whole'] - used_us:+.1f}")
    machine = {"cpu": processes.cpu_name(), "load_average": round(os.getloadavg()[0], 2)}
    print(json.dumps({"us_without": found, "machine": machine}))


assert SERVE[1] == "serve", "what this module takes for it"

if __name__ == "__main__":
    main()
