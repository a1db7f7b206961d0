"""The words that `tokenway replay` takes: options by what they are about."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from typing import Any, NoReturn

from extproc.observing.printable import printable
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.replay.caches import ViewKind
from tokenway.simulator.replay.readers import Format
from tokenway.simulator.replay.settings import RunSettings, Spread
from tokenway.simulator.replay.summary import Slo

_MAX_DIGITS = 9

_DEFAULT, _DEFAULT_NUMBER = "(default %(default)s)", "(default %(default)g)"
"""For argparse: how an option's help ends."""


def replay_parser() -> argparse.ArgumentParser:
    """For the words after `replay`; what it refuses ends the process with code 2 and one line."""
    parser = _Parser(
        prog="tokenway replay",
        description="Replay a trace through a simulated fleet, in virtual time, under each policy.",
    )
    parser.add_argument("trace", help="a trace file, `sample`, or gen:NAME[:requests=N]")
    _add_trace(parser.add_argument_group("trace").add_argument)
    _add_clients(parser.add_argument_group("clients").add_argument)
    _add_fleet(parser.add_argument_group("fleet").add_argument)
    _add_policies(parser.add_argument_group("policies").add_argument)
    _add_figures(parser.add_argument_group("figures").add_argument)
    return parser


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = inf
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"`{text}` is no number")
    return value


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number of at most {_MAX_DIGITS} digits")
    return int(text)


def _several(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"`{text}` is not 1 or more")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for what is found wrong later."""
        self.exit(2, printable(f"tokenway replay: {message}") + "\n")


def _add_trace(add: Callable[..., Any]) -> None:
    add("--format", choices=[str(form) for form in Format], help="of the file; guessed if left out")
    add(
        "--rates",
        default="auto",
        metavar="LIST",
        help=f"speeds such as x1,x2.5, or auto: around the knee {_DEFAULT}",
    )
    add(
        "--knee-policies",
        default="lmetric,inference_lb",
        metavar="LIST",
        help=f"the best of them has the knee {_DEFAULT}",
    )
    add("--max-requests", type=_several, metavar="N", help="the first N alone")
    add(
        "--max-context",
        type=_several,
        default=131_072,
        metavar="TOKENS",
        help=f"drop what is longer {_DEFAULT}",
    )
    add("--share", action="store_true", help="make up shared prefixes for a trace that names none")
    add(
        "--tide",
        type=_number,
        metavar="DEPTH",
        help="let the rate rise and fall as over a day, by DEPTH of its mean",
    )
    add("--duration-s", type=_number, metavar="S", help="let nothing arrive later")
    add(
        "--warmup-s",
        type=_number,
        default=RunSettings().warmup_s,
        metavar="S",
        help=f"do not count what arrives before {_DEFAULT_NUMBER}",
    )


def _add_clients(add: Callable[..., Any]) -> None:
    default = RunSettings()
    add(
        "--abandon-share",
        type=_number,
        default=default.abandon_share,
        metavar="SHARE",
        help=f"of the clients that leave {_DEFAULT_NUMBER}",
    )
    add(
        "--abandon-after-s",
        type=_number,
        default=default.abandon_after_s,
        metavar="S",
        help=f"without a first token {_DEFAULT_NUMBER}",
    )
    add(
        "--retry-refused",
        type=_whole,
        nargs="?",
        const=2,
        default=default.retries,
        metavar="N",
        help=f"refused clients come again after Retry-After, N times at most, 2 without a number {_DEFAULT}",
    )


def _add_fleet(add: Callable[..., Any]) -> None:
    add(
        "--profile",
        default="llama8b-h100",
        help=f"one of {', '.join(PROFILES)}, or of --profiles {_DEFAULT}",
    )
    add("--profiles", type=Path, metavar="FILE", help="JSON: more profiles by name")
    add("--fleet", metavar="LIST", help="name:count[:weight],... instead of eight of --profile")
    add(
        "--engines",
        action="append",
        default=[],
        metavar="N",
        help="so many of --profile; +N or -N: so many more or fewer than there would be",
    )
    add(
        "--kv-scale",
        type=_number,
        default=1.0,
        metavar="X",
        help=f"factor on every KV cache {_DEFAULT_NUMBER}",
    )


def _add_policies(add: Callable[..., Any]) -> None:
    add(
        "--policies",
        default="all",
        metavar="LIST",
        help="names with parameters and a view, name:param=value@view, or all, rivals, late, own, oracles"
        f" {_DEFAULT}",
    )
    _add_views(add)
    default = RunSettings()
    add(
        "--token-error",
        type=_number,
        default=default.token_error,
        metavar="SIGMA",
        help=f"how far gateways are off in tokens per byte, from request to request {_DEFAULT_NUMBER}",
    )
    add(
        "--max-hold-s",
        type=_number,
        default=default.max_hold_s,
        metavar="S",
        help=f"longest that a gateway holds a request {_DEFAULT_NUMBER}",
    )
    add(
        "--max-held",
        type=_whole,
        default=default.max_held,
        metavar="N",
        help=f"most requests that a gateway holds {_DEFAULT}",
    )


def _add_views(add: Callable[..., Any]) -> None:
    """What gateways see of engines, and of each other."""
    default = RunSettings()
    add(
        "--view",
        default=str(default.view),
        choices=[str(kind) for kind in ViewKind],
        help=f"what gateways know of caches {_DEFAULT}",
    )
    add(
        "--gateways",
        type=_several,
        default=default.gateways,
        metavar="N",
        help=f"each with a ledger of its own {_DEFAULT}",
    )
    add(
        "--spread",
        default=str(default.spread),
        choices=[str(spread) for spread in Spread],
        help=f"of requests over gateways {_DEFAULT}",
    )
    for name, seconds, meaning in (
        ("--push-delay-ms", default.push_delay_s, "until a gateway hears what another did"),
        ("--event-lag-ms", default.event_lag_s, "from the end of a step to its cache events"),
        ("--metric-age-ms", default.metric_age_s, "how often engines are scraped; 0 reads them live"),
    ):
        add(name, type=_number, default=seconds * 1e3, metavar="MS", help=f"{meaning} {_DEFAULT_NUMBER}")
    add(
        "--event-loss",
        type=_number,
        default=default.event_loss,
        metavar="SHARE",
        help=f"of the steps whose cache events never arrive {_DEFAULT_NUMBER}",
    )
    add("--no-first-token", action="store_true", help="gateways do not see the first token")
    add(
        "--router-block",
        type=_several,
        default=default.router_block_tokens,
        metavar="TOKENS",
        help=f"most tokens of a router's block {_DEFAULT}",
    )


def _add_figures(add: Callable[..., Any]) -> None:
    slo = Slo()
    for name, seconds, meaning in (
        ("--slo-ttft-ms", slo.ttft_s, "a request is good up to this time to its first token"),
        ("--slo-tpot-ms", slo.tpot_s, "and up to this time per token after it"),
    ):
        add(name, type=_number, default=seconds * 1e3, metavar="MS", help=f"{meaning} {_DEFAULT_NUMBER}")
    add("--seeds", type=_several, default=1, metavar="N", help=f"runs of each kind {_DEFAULT}")
    add("--first-seed", type=_whole, default=0, metavar="N", help=f"the others follow it {_DEFAULT}")
    add("--jobs", type=_several, default=os.cpu_count() or 1, metavar="N", help=f"processes {_DEFAULT}")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--no-timings", action="store_true", help="leave real times out of the JSON: the rest is repeatable")
    add("--plots", type=Path, metavar="DIR", help="write PNG pictures (needs tokenway[simulator])")
