"""`tokenway replay`: a trace through a simulated fleet, under each policy, as one table."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from typing import Any, Self

import orjson

from extproc.observing.printable import printable
from extproc.observing.wording import counted
from metadata_center.files import read_regular, write_whole
from tokenway.cli.replay_options import replay_parser
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.replay.caches import ViewKind
from tokenway.simulator.replay.fleet import Fleet, Member, parse_fleet, profiles_from, scaled_kv
from tokenway.simulator.replay.lineup import Entrant, parse_lineup
from tokenway.simulator.replay.readers import Format, TraceError
from tokenway.simulator.replay.report import document, markdown
from tokenway.simulator.replay.settings import RunSettings, Spread
from tokenway.simulator.replay.sources import open_trace
from tokenway.simulator.replay.summary import RunResult, Slo
from tokenway.simulator.replay.sweep import (
    AUTO_SPEEDS,
    Job,
    Knee,
    find_knee,
    full_speed,
    pool,
    run_all,
    speed_at_once,
)
from tokenway.simulator.replay.trace import Trace

_DEFAULT_ENGINES = 8

_ENGINES = re.compile(r"[+-]?[0-9]{1,4}")


def replay(args: Sequence[str]) -> int:
    """Replay a trace and print the comparison as Markdown.

    Args:
        args: Command line after `replay`.

    Returns:
        Exit code: 0; 1 if a file cannot be used; 2 if the words cannot.
    """
    try:
        return _replay(replay_parser().parse_args(args))
    except BrokenPipeError:
        raise  # nobody reads what it says, which is no error of a file
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        print(printable(f"tokenway replay: {said}"), file=sys.stderr)
        return 1
    except (TraceError, _ProfilesError) as error:
        print(printable(f"tokenway replay: {error}"), file=sys.stderr)
        return 1
    except (ValueError, MemoryError, OverflowError) as error:
        print(printable(f"tokenway replay: {error or 'more than there is memory for'}"), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"tokenway replay: {error}: pip install 'tokenway[simulator]'", file=sys.stderr)
        return 2


class _ProfilesError(ValueError):
    """A file of profiles that cannot be used."""


def _replay(options: argparse.Namespace) -> int:
    fleet = _fleet(options)
    rates = None if options.rates == "auto" else _speeds(options.rates)
    settings = _settings(options)
    entrants = parse_lineup(options.policies)
    slo = Slo(options.slo_ttft_ms / 1000.0, options.slo_tpot_ms / 1000.0)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    traces = _traces(options, fleet, seeds)
    first = traces[seeds[0]]
    if not first.requests:
        raise ValueError(f"{options.trace}: no request is left")
    _check_writable(options)

    def job(entrant: Entrant, speed: float, seed: int) -> Job:
        return Job(entrant, traces[seed], fleet, replace(settings, speed=speed), seed, slo)

    with pool(options.jobs) as executor:
        knee = None
        if rates is None:
            judges = parse_lineup(options.knee_policies)
            start = full_speed(first, fleet)
            _say(f"looking for the knee around speed x{start:.2f}")
            knee = find_knee(
                lambda speed: [job(judge, speed, seeds[0]) for judge in judges],
                start,
                executor,
                fastest=speed_at_once(first),
            )
            speeds = [knee.speed * factor for factor in AUTO_SPEEDS] if knee.missing is None else [knee.speed]
        else:
            speeds = rates
        jobs = [job(entrant, speed, seed) for speed in speeds for entrant in entrants for seed in seeds]
        with _Bar(len(jobs)) as bar:
            results = run_all(jobs, executor, bar.done)
    print(_heading(first, fleet, settings, slo, len(seeds), knee))
    print(markdown(results))
    if options.json is not None:
        command = {
            **_command(options),
            "knee_speed": None if knee is None or knee.missing else knee.speed,
            "dropped": first.dropped,
        }
        content = document(command, results, timings=not options.no_timings)
        write_whole(options.json, orjson.dumps(content, option=orjson.OPT_INDENT_2))
    if options.plots is not None:
        from tokenway.simulator.replay.plots import draw

        for path in draw(results, options.plots, first.name):
            _say(f"wrote {path}")
    return 0


def _settings(options: argparse.Namespace) -> RunSettings:
    return RunSettings(
        gateways=options.gateways,
        spread=Spread(options.spread),
        push_delay_s=options.push_delay_ms / 1000.0,
        view=ViewKind(options.view),
        event_lag_s=options.event_lag_ms / 1000.0,
        event_loss=options.event_loss,
        metric_age_s=options.metric_age_ms / 1000.0,
        first_token=not options.no_first_token,
        router_block_tokens=options.router_block,
        token_error=options.token_error,
        max_hold_s=options.max_hold_s,
        max_held=options.max_held,
        abandon_after_s=options.abandon_after_s,
        abandon_share=options.abandon_share,
        retries=options.retry_refused,
        warmup_s=options.warmup_s,
        duration_s=options.duration_s,
    )


def _traces(options: argparse.Namespace, fleet: Fleet, seeds: Iterable[int]) -> dict[int, Trace]:
    """The trace by seed, without what no engine of the fleet has room for."""
    smallest = min(member.profile.kv_tokens for member in fleet)
    return {
        seed: open_trace(
            options.trace,
            seed,
            form=None if options.format is None else Format(options.format),
            max_requests=options.max_requests,
            max_context_tokens=min(options.max_context, smallest),
            share=options.share,
            tide=options.tide,
        )
        for seed in seeds
    }


class _Bar:
    """Progress on a terminal's standard error, nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return self  # a bar is a comfort; the extra that brings it is not asked for
            self._bar = tqdm(total=self._total, unit="run", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def done(self, result: RunResult) -> None:
        """One run is over."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{result.policy} x{result.speed:.3g}")
            self._bar.update(1)


def _fleet(options: argparse.Namespace) -> Fleet:
    """The fleet asked for, what-ifs applied."""
    profiles = PROFILES
    if options.profiles is not None:
        content = read_regular(options.profiles)
        try:
            profiles = profiles_from(orjson.loads(content))
        except ValueError as error:
            raise _ProfilesError(f"{options.profiles}: {error}") from None
    if options.profile not in profiles:
        raise ValueError(f"no profile is called {options.profile!r}; there are {', '.join(profiles)}")
    one = Member(profiles[options.profile])
    fleet: Fleet = (one,) * _DEFAULT_ENGINES
    if options.fleet is not None:
        fleet = parse_fleet(options.fleet, profiles)
    for change in options.engines:
        if not _ENGINES.fullmatch(change):
            raise ValueError(f"--engines takes a number of engines, +N or -N, not {change!r}")
        count = int(change)
        if change.startswith("+"):
            fleet += (one,) * count
        elif change.startswith("-"):
            fleet = fleet[:count]
        else:
            fleet = (one,) * count
    if not fleet:
        raise ValueError("no engine is left")
    return scaled_kv(fleet, options.kv_scale)


def _speeds(text: str) -> list[float]:
    """Factors from a list such as `x2,2.5,x3`."""
    try:
        speeds = [float(part.strip().removeprefix("x")) for part in text.split(",")]
    except ValueError:
        speeds = [inf]
    if not all(isfinite(speed) and speed > 0 for speed in speeds):
        raise ValueError(f"rates are `auto` or factors above 0 such as x1,x2.5: {text!r}")
    return speeds


def _check_writable(options: argparse.Namespace) -> None:
    """Find out before the runs, which take long, that their results could not be written.

    Raises:
        OSError: A file or a folder cannot be made there.
        ModuleNotFoundError: Pictures are wanted, and what draws them is not installed.
    """
    path = options.json
    is_there = path is not None and path.exists()
    if path is not None and not (is_there and path.is_fifo()):
        with path.open("ab"):  # what an earlier run wrote stays until there are new results
            pass
        if not is_there:
            path.unlink()
    if options.plots is not None:
        if find_spec("matplotlib") is None:  # it is imported when it draws
            raise ModuleNotFoundError("No module named 'matplotlib'")
        options.plots.mkdir(parents=True, exist_ok=True)


def _heading(
    trace: Trace, fleet: Fleet, settings: RunSettings, slo: Slo, seeds: int, knee: Knee | None
) -> str:
    groups = Counter(f"{member.profile.name} ({member.profile.kv_tokens:,} KV tokens)" for member in fleet)
    lines = [
        f"## {trace.name}: {counted(len(trace.requests), 'request')}, {counted(seeds, 'seed')}",
        "",
        "- engines: " + ", ".join(f"{count} × {group}" for group, count in groups.items()),
        f"- {counted(settings.gateways, 'gateway')}, cache view {settings.view},"
        f" events {settings.event_lag_s * 1e3:.0f} ms late,"
        f" metrics up to {settings.metric_age_s * 1e3:.0f} ms old,"
        f" first token {'seen' if settings.first_token else 'not seen'},"
        f" token estimates off by {settings.token_error:.0%}",
        f"- good: TTFT ≤ {slo.ttft_s:g} s and TPOT ≤ {slo.tpot_s * 1e3:g} ms",
    ]
    if trace.dropped:
        lines.append(f"- dropped as too long: {counted(trace.dropped, 'request')}")
    if knee is not None:
        found = f"- knee: speed ×{knee.speed:.3g}"
        lines.append(found if knee.missing is None else f"- no knee: {knee.missing}; `--rates` says speeds")
    return "\n".join([*lines, ""])


def _command(options: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on, as it was given."""
    where = {"json", "plots", "jobs", "no_timings"}
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in where
    }


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
