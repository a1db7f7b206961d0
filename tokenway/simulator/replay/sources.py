"""What to replay: a trace file, a shipped sample, or a generator by name."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from random import Random
from typing import Final

from tokenway.simulator.replay.generators import GENERATORS, with_sharing
from tokenway.simulator.replay.readers import Format, read_trace
from tokenway.simulator.replay.trace import Trace, limited, with_tide

GENERATED: Final = "gen:"
SAMPLE: Final = "sample"
SAMPLE_FILE: Final = "chat.jsonl.gz"


def open_trace(
    name: str,
    seed: int,
    *,
    form: Format | None = None,
    max_requests: int | None = None,
    max_context_tokens: int | None = None,
    share: bool = False,
    tide: float | None = None,
) -> Trace:
    """A trace by its name.

    Args:
        name: A path; `sample`; or `gen:NAME`, `gen:NAME:requests=N` of a generator.
        seed: Of a generator and of made-up sharing; a file is the same for all seeds.
        form: Format of a file, None to guess it.
        max_requests: Keep the first so many, or None for all.
        max_context_tokens: Drop longer requests, or None for none.
        share: Make up what requests without ids share.
        tide: Let them come as `with_tide` says; None leaves them.

    Raises:
        TraceError: The file is not a trace.
        OSError: It cannot be read.
        ValueError: There is no such generator or parameter.
    """
    rng = Random(f"{seed}/trace")
    if name.startswith(GENERATED):
        trace = _generated(name.removeprefix(GENERATED), rng)
    elif name == SAMPLE:
        with as_file(files("tokenway.simulator.replay") / "samples" / SAMPLE_FILE) as path:
            trace = read_trace(path, form)
    else:
        trace = read_trace(Path(name), form)
    trace = limited(trace, max_requests=max_requests, max_context_tokens=max_context_tokens)
    if share:
        if any(request.runs for request in trace.requests):
            raise ValueError(f"{name} says itself what its requests share")
        trace = with_sharing(trace, rng)
    return trace if tide is None else with_tide(trace, tide)


def _generated(spec: str, rng: Random) -> Trace:
    kind, *settings = spec.split(":")
    if kind not in GENERATORS:
        raise ValueError(f"no generator is called {kind!r}; there are {', '.join(GENERATORS)}")
    requests = 3000
    for setting in settings:
        key, _, value = setting.partition("=")
        if key != "requests" or not value.isdigit() or not int(value):
            raise ValueError(f"a generator's one parameter is requests, a number > 0: {setting!r}")
        requests = int(value)
    return GENERATORS[kind](rng, requests)
