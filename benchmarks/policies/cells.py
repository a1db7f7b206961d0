"""What is compared: workloads, policies and seeds as literal `tokenway replay` command lines.

Rules:
    1. A cell is one command line, run in the folder of the traces; the line shown is the line that ran, but
       for where its figures and pictures go and how many processes it takes.
    2. Seeds 1 and 2 are for shaping rules and finding speeds; cells use the held-out seeds 3, 4 and 5.
    3. Cells are in the order of their importance: a run that stops early has the best part.
    4. Rivals, oracles and the product's own rules are in different cells, so that a change of one kind asks
       for no run of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final


class CellKind(StrEnum):
    """Whose runs a cell holds: what they depend on.

    RIVALS and ORACLES are of one gateway. WHOLE cells depend on everything: they mix, or have more gateways.
    """

    RIVALS = "rivals"
    ORACLES = "oracles"
    OWN = "own"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace through a fleet.

    Attributes:
        name: In names of cells and files.
        title: In tables.
        line: Trace and options of `tokenway replay`.
        speeds: Below, at and just past the knee of the best rival on seeds 1 and 2; of `EXTRA` one.
        run_s: CPU seconds of one run at the middle speed (`lmetric`, one core of a shared x86 server). For
            the estimate alone.
        seeds: Everybody's; the first alone is that of views that rivals ship with, of oracles nearby and of
            what is beside the comparison.
    """

    name: str
    title: str
    line: tuple[str, ...]
    speeds: tuple[float, ...]
    run_s: float
    seeds: tuple[int, ...] = (3, 4, 5)


@dataclass(frozen=True, slots=True)
class Cell:
    """One command line.

    Attributes:
        workload: Name of its workload.
        group: What it is for; with workload and seed it makes the name.
        kind: Whose runs.
        seed: Of all of them.
        policies: As `--policies` takes them.
        speeds: As `--rates` takes them.
        line: Trace and all other options.
        pictures: Have `--plots` draw.
    """

    workload: str
    group: str
    kind: CellKind
    seed: int
    policies: tuple[str, ...]
    speeds: tuple[float, ...]
    line: tuple[str, ...]
    pictures: bool = False

    @property
    def name(self) -> str:
        """Distinct among all cells; a file name."""
        return f"{self.workload}.{self.group}.{self.seed}"

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line."""
        rates = ",".join(f"x{speed:g}" for speed in self.speeds)
        return (
            *("tokenway", "replay", *self.line),
            *("--policies", ",".join(self.policies), "--rates", rates, "--first-seed", str(self.seed)),
        )

    @property
    def runs(self) -> int:
        """How many runs it is."""
        return len(self.policies) * len(self.speeds)

    def answers(self, word: str) -> bool:
        """True if `word` names its workload, group, kind or seed."""
        return word in (self.workload, self.group, self.kind, str(self.seed), self.name)


_CONVERSATION: Final = "mooncake_conversation.jsonl.gz"

WORKLOADS: Final = (
    Workload("conversation", "conversation, 8 engines", (_CONVERSATION,), (2.5, 2.75, 3.0), 16.0),
    Workload(
        "sessions",
        "agent sessions, 8 engines",
        ("claude_code_sessions.jsonl.xz", "--duration-s", "900"),
        (1.0, 1.5, 1.75),
        3.5,
    ),
    Workload(
        "mixed",
        "conversation, 5 H100 + 5 A100",
        (_CONVERSATION, "--max-requests", "4000", "--fleet", "llama8b-h100:5,llama8b-a100:5:0.4"),
        (2.0, 2.3, 2.6),
        6.0,
    ),
    Workload(
        "hot-spot",
        "hot-spot, 4 engines",
        ("gen:hot-spot:requests=2500", "--engines", "4"),
        (1.5, 1.8, 2.1),
        1.8,
    ),
    Workload(
        "low-sharing",
        "low sharing, 4 engines",
        ("gen:low-sharing:requests=2500", "--engines", "4"),
        (1.4, 1.55, 1.65),
        1.5,
    ),
    Workload(
        "azure",
        "Azure + made-up sharing, 4 engines",
        ("azure2023_conv.csv.gz", "--share", "--max-requests", "4000", "--engines", "4"),
        (14.0, 16.0, 18.0),
        1.5,
    ),
    Workload(
        "multi-tenant",
        "multi-tenant, 4 engines",
        ("gen:multi-tenant:requests=6000", "--engines", "4"),
        (2.5, 2.75, 3.25),
        8.0,
    ),
    Workload(
        "bursty",
        "bursty, 4 engines",
        ("gen:bursty:requests=6000", "--engines", "4"),
        (2.5, 2.75, 3.25),
        8.0,
    ),
)
"""Profile: an 8B model on an H100 (the command's default) unless the fleet says otherwise."""

LATER: Final = frozenset({"multi-tenant", "bursty"})
"""Made by generator and close to others: after all of the rest."""

STRONG: Final = ("lmetric", "smetric", "dynamo_product", "dynamo_linear", "llmd_sticky", "llmd_predicted")
"""Those that led while rules were shaped on seeds 1 and 2."""

SIMPLE: Final = ("random", "round_robin", "least_request")

REST: Final = (
    *("vllm_dp", "aigw", "aibrix_prefix_cache", "aibrix_prefix_cache_own", "aibrix_manifest"),
    *("aibrix_manifest_own", "llmd_weights", "llmd_weights_lru", "llmd_observed", "sglang_cache_aware"),
    *("sglang_cache_aware_own", "preble_e2", "preble_e2_own", "chwbl"),
)

LATE: Final = (
    *("llmd_flow", "llmd_flow_sticky", "dynamo_queue", "dynamo_queue_wspt"),
    *("smg_priority", "quartz"),
)
"""Rivals that let requests wait at the gateway, as the product's own late binding does."""

LATE_GROUPS: Final = ("late", "late-knee")
"""Groups of their cells: past the knee (and all speeds of one workload), and at it."""

LATE_AT_ALL_SPEEDS: Final = "hot-spot"
"""The workload whose runs are among the shortest, and whose prompts have most in common."""

AFFINITY: Final = ("llmd_affinity",)
"""Decides at once; came with those that do not, and runs in their cells."""

IMMEDIATE: Final = ("lmetric", "smetric", "llmd_predicted")
"""Of the strong, beside what is not of the comparison itself."""

OWN: Final = ("inference_lb", "least_completion", "late_completion")

SAID: Final = tuple(f"{name}:max_num_seqs=128" for name in OWN[1:])
"""The operator says in clusters.json how many sequences an engine runs, here 128."""

WITH_LIMIT_SAID: Final = ("hot-spot", "azure", "multi-tenant", "bursty")
"""Workloads whose engines are at times full by number."""

ORACLE: Final = ("oracle:work=4",)

ORACLE_NEAR: Final = ("oracle:work=1",)


@dataclass(frozen=True, slots=True)
class Shipped:
    """How a rival sees caches where it is at home.

    Attributes:
        entrant: Policy and view.
        reason: Why that view.
    """

    entrant: str
    reason: str


SHIPPED: Final = (
    Shipped(
        "aigw@history", "its tree is written when response headers come, before prefill is known to be done"
    ),
    Shipped("lmetric:pending=false@history", "SGLang's port: its gateway's tree of what it routed"),
    Shipped("smetric@history", "vllm-router's text tree of what it routed"),
    Shipped("dynamo_linear@events", "KV events alone; what is on its way is charged as load, not as cache"),
    Shipped("dynamo_product@events", "as dynamo_linear"),
    Shipped(
        "llmd_weights@history",
        "the default producer records a prompt when it is scheduled; metrics every 50 ms",
    ),
    Shipped("llmd_weights_lru@history", "as llmd_weights; the scorer is the guide's"),
    Shipped("llmd_sticky@history", "the guide's baseline uses the same producer"),
    Shipped("llmd_predicted@history", "as llmd_sticky"),
)
"""Rivals that ship with another view than `events+pending`, which all others are given too.

Not here: what never looks at a cache (random, round_robin, least_request, vllm_dp, llmd_observed, chwbl),
what keeps an index of its own (names that end in `_own`), and what llm-d calls precise (events and, for two
seconds, prompts on their way), which is the default.
"""

LLMD_METRIC_AGE: Final = ("--metric-age-ms", "50")
"""llm-d reads metrics every 50 ms; the default is vLLM's 100."""

SHORT: Final = (_CONVERSATION, "--max-requests", "4000")
"""The conversation trace cut, for questions beside the comparison."""

EXTRA: Final = (
    Workload(
        "sessions-deep",
        "agent sessions in deep overload, 8 engines",
        ("claude_code_sessions.jsonl.xz", "--duration-s", "600"),
        (2.5,),
        4.0,
        (3,),
    ),
    Workload(
        "tide",
        "Azure + made-up sharing with a day's tide, 4 engines",
        ("azure2023_conv.csv.gz", "--share", "--tide", "0.6", "--engines", "4"),
        (12.0,),
        8.0,
        (3,),
    ),
    Workload(
        "impatient",
        "conversation, a fifth leaves after 10 s, the refused come again, 8 engines",
        (*SHORT, "--abandon-share", "0.2", "--abandon-after-s", "10", "--retry-refused"),
        (3.25,),
        5.5,
        (3,),
    ),
    Workload(
        "events-lost",
        "conversation, a tenth of the cache events lost, 8 engines",
        (*SHORT, "--event-loss", "0.1"),
        (2.75,),
        5.5,
        (3,),
    ),
    Workload(
        "two-engines",
        "conversation, 2 engines",
        (_CONVERSATION, "--max-requests", "1000", "--engines", "2"),
        (0.7,),
        1.5,
        (3,),
    ),
    Workload(
        "many-engines",
        "conversation, 64 engines",
        (_CONVERSATION, "--max-requests", "2000", "--engines", "64"),
        (22.0,),
        6.0,
        (3,),
    ),
)
"""Rows beside the comparison, at one speed and seed each: what a fleet meets besides a steady load.

`tide`: the whole trace, 19,366 requests, warped so that their rate rises from 0.4 to 1.6 of its mean and
falls again once (`tokenway.simulator.replay.trace.with_tide`): a day of 290 s.
"""

_COMPARED: Final = ("lmetric", "least_completion", "late_completion")

PICTURED: Final = ("lmetric", "smetric", "llmd_flow", "quartz", "least_completion", "late_completion")
"""Few enough to distinguish in a picture."""

_BESIDE_SEED: Final = 3


def cells() -> tuple[Cell, ...]:
    """All cells, the most important first."""
    first = [workload for workload in WORKLOADS if workload.name not in LATER]
    later = [workload for workload in WORKLOADS if workload.name in LATER]
    found = [cell for workload in first for cell in _seed(workload, workload.seeds[0])]
    found += [cell for at in (1, 2) for workload in first for cell in _seeds_after(workload, at)]
    found += [_shipped(workload, group) for workload in first for group in ("shipped", "shipped-llmd")]
    found += _gateways()
    found += [cell for workload in later for cell in _seed(workload, workload.seeds[0])]
    found += [cell for at in (1, 2) for workload in later for cell in _seeds_after(workload, at)]
    found += [_shipped(workload, group) for workload in later for group in ("shipped", "shipped-llmd")]
    found += _what_if()
    found += _pictures()
    found += _with_limit_said()
    found += _late(first, later)
    found += [cell for workload in EXTRA for cell in _extra(workload)]
    longest_last = (*first[1:], *later, first[0])
    found += [_rest(workload, seed) for workload in longest_last[:-1] for seed in workload.seeds]
    found += [
        _main(workload, "oracle-1", CellKind.ORACLES, workload.seeds[0], ORACLE_NEAR)
        for workload in longest_last
    ]
    found += [_rest(longest_last[-1], seed) for seed in longest_last[-1].seeds]
    return tuple(found)


def selected(all_cells: Sequence[Cell], only: Sequence[str]) -> tuple[Cell, ...]:
    """The cells that every list of `only` names by a word.

    Args:
        all_cells: To choose from.
        only: Each a comma-separated list of workloads, groups, kinds, seeds or names.

    Raises:
        ValueError: A word names nothing.
    """
    lists = [text.split(",") for text in only]
    for word in (word for words in lists for word in words):
        if not any(cell.answers(word) for cell in all_cells):
            raise ValueError(f"no cell answers to {word!r}")
    return tuple(
        cell for cell in all_cells if all(any(cell.answers(word) for word in words) for words in lists)
    )


def named(all_cells: Sequence[Cell], name: str) -> Cell:
    """The cell of that name.

    Raises:
        ValueError: There is none.
    """
    for cell in all_cells:
        if cell.name == name:
            return cell
    raise ValueError(f"no cell is called {name!r}")


def _main(workload: Workload, group: str, kind: CellKind, seed: int, policies: tuple[str, ...]) -> Cell:
    return Cell(workload.name, group, kind, seed, policies, workload.speeds, workload.line)


def _seed(workload: Workload, seed: int) -> Iterator[Cell]:
    yield _main(workload, "strong", CellKind.RIVALS, seed, STRONG)
    yield _main(workload, "oracle-4", CellKind.ORACLES, seed, ORACLE)
    yield _main(workload, "own", CellKind.OWN, seed, OWN)
    yield _main(workload, "simple", CellKind.RIVALS, seed, SIMPLE)


def _seeds_after(workload: Workload, at: int) -> Iterator[Cell]:
    for seed in workload.seeds[at : at + 1]:
        yield _main(workload, "strong", CellKind.RIVALS, seed, STRONG)
        yield _main(workload, "oracle-4", CellKind.ORACLES, seed, ORACLE)
        yield _main(workload, "own", CellKind.OWN, seed, OWN)
        yield _main(workload, "simple", CellKind.RIVALS, seed, SIMPLE[-1:])


def _rest(workload: Workload, seed: int) -> Cell:
    """Rivals that no other cell of that seed has."""
    policies = REST if seed == workload.seeds[0] else (*SIMPLE[:-1], *REST)
    return _main(workload, "rest", CellKind.RIVALS, seed, policies)


def _with_limit_said() -> list[Cell]:
    said = [workload for workload in WORKLOADS if workload.name in WITH_LIMIT_SAID]
    return [
        _main(workload, "limit-said", CellKind.OWN, seed, SAID)
        for workload in said
        for seed in workload.seeds
    ]


def _late(first: Sequence[Workload], later: Sequence[Workload]) -> Iterator[Cell]:
    """The rivals that came last: on one workload at all speeds, on the others past the knee, then at it.

    Below it nothing waits, and one that would wait is the rule that it places by.
    """
    policies = (*LATE, *AFFINITY)
    for at in range(3):
        for workload in (*first[1:], *later, first[0]):
            for seed in workload.seeds[at : at + 1]:
                cell = _main(workload, "late", CellKind.RIVALS, seed, policies)
                if workload.name == LATE_AT_ALL_SPEEDS:
                    yield cell
                    continue
                yield replace(cell, speeds=workload.speeds[-1:])
                yield replace(cell, group="late-knee", speeds=workload.speeds[1:2])


def _extra(workload: Workload) -> Iterator[Cell]:
    seed = workload.seeds[0]
    yield _main(workload, "late", CellKind.RIVALS, seed, (*LATE, *AFFINITY))
    yield _main(workload, "strong", CellKind.RIVALS, seed, IMMEDIATE)
    yield _main(workload, "own", CellKind.OWN, seed, OWN[1:])


def _shipped(workload: Workload, group: str) -> Cell:
    """Rivals with the view they ship with, at the knee."""
    llmd = group == "shipped-llmd"
    entrants = tuple(each.entrant for each in SHIPPED if each.entrant.startswith("llmd") == llmd)
    line = (*workload.line, *LLMD_METRIC_AGE) if llmd else workload.line
    return Cell(
        workload.name, group, CellKind.RIVALS, workload.seeds[0], entrants, (workload.speeds[1],), line
    )


def _short(group: str, policies: tuple[str, ...], speeds: tuple[float, ...], *options: str) -> Cell:
    return Cell(
        "conversation-4000", group, CellKind.WHOLE, _BESIDE_SEED, policies, speeds, (*SHORT, *options)
    )


def _gateways() -> list[Cell]:
    """More gateways, and other views of the caches."""
    counts = [
        _short(f"gateways-{count}", _COMPARED, (2.75, 3.0), "--gateways", str(count)) for count in (1, 2, 4)
    ]
    views = [
        _short(f"view-{view}", _COMPARED, (2.75, 3.0), "--view", view)
        for view in ("history", "history-confirmed", "events")
    ]
    return [*counts, *views]


def _what_if() -> list[Cell]:
    """Questions of an operator, each beside the cell `gateways-1`."""
    speeds = (2.75, 3.0)
    return [
        _short("default", OWN, speeds),
        _short("one-more-engine", OWN, speeds, "--engines", "+1"),
        _short("half-the-kv", OWN, speeds, "--kv-scale", "0.5"),
        _short("cache-weight-4", ("inference_lb:cache_ratio_weight=4",), speeds),
        _short("nothing-learned", ("least_completion:learn=false", "late_completion:learn=false"), speeds),
        _short("prefill-thought-3-times-as-dear", tuple(f"{name}:bias=3" for name in OWN[1:]), speeds),
        _short("prefill-thought-a-third-as-dear", tuple(f"{name}:bias=0.33" for name in OWN[1:]), speeds),
    ]


def _pictures() -> list[Cell]:
    """Past the knee of a workload whose runs are short: below it all pictures are alike."""
    (workload,) = (each for each in WORKLOADS if each.name == "hot-spot")
    past = _main(workload, "pictures", CellKind.WHOLE, workload.seeds[0], PICTURED)
    return [replace(past, speeds=workload.speeds[-1:], pictures=True)]
