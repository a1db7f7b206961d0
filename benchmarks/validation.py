"""How far the engine simulator is from real engines.

    python -m benchmarks.validation --measured FOLDER [--tokens FILE] [--plots DIR]
    python -m benchmarks.validation --vllm [--seconds 60] [--rate 4] [--plots DIR]

The first reads runs of vLLM on GPUs that others measured (`NAME_requests.jsonl`, `_timeseries.csv`,
`_meta.json`), fits the step model to the requests of the first half of each run, plays all of them again and
compares both halves and the whole. The second starts a real vLLM on one CPU core (`make vllm`), loads it
itself, and does the same, but with every other request in place of the first half: a machine that others use
changes its speed. Prints tables, last a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from testbed.vllm.engine import SERVED_MODEL, Vllm
from tokenway.simulator.engine.profile import PROFILES, EngineProfile
from tokenway.simulator.validation.comparing import Comparison, compare, gauge_errors, halves
from tokenway.simulator.validation.datasheet import Card, Model, from_datasheet
from tokenway.simulator.validation.files import read_layers, read_meta, read_run, run_names
from tokenway.simulator.validation.fitting import CONSTANTS, fit
from tokenway.simulator.validation.measured import Run
from tokenway.simulator.validation.measuring import MeasuredRequest, measure, mixed_load
from tokenway.simulator.validation.playing import play

CARDS: Final = {
    # NVIDIA's data sheets; bf16 with 32-bit accumulation, dense. The workstation Blackwell accumulates at
    # full rate, so its 4,000 sparse FP4 TOPS are 500 of these.
    "RTX4090": Card(bytes_per_s=1.008e12, flops_per_s=165e12, memory_bytes=25.25e9),
    "RTXPRO6000": Card(bytes_per_s=1.792e12, flops_per_s=500e12, memory_bytes=102.6e9),
}

LLAMA_LAYERS: Final = 32

MODELS: Final = {
    # From the models' configurations. A step reads all weights but the embeddings.
    "Llama-3.1-8B": Model(16.06e9, 15.0e9, 8.03e9, 32 * 32 * 128, 131_072),
    # Of one of two ranks: half of the experts, all the rest.
    "Qwen3-30B-A3B-Instruct-2507": Model(32e9, 32e9, 3.3e9, 48 * 32 * 128, 98_304),
}

CPU_START: Final = EngineProfile("vllm-cpu", 1.0, 3.0, 0.08, 2e-5, 1e-4, 0.3, 3.0, 16_384, 32, 2048, 128)
"""A guess at the small test model on one core: 10 ms for a short prompt, 40 ms for 512 tokens."""


def main() -> int:
    """Run it; the exit code is 0, or 1 if a dense GPU run is more than 10 % off on mean TTFT or TPOT."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.validation", description=__doc__.split("\n")[0]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measured", type=Path, metavar="FOLDER", help="of measured runs")
    source.add_argument("--vllm", action="store_true", help="measure a vLLM on one CPU core now")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="token ids of the measured requests")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write a PNG per run")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load on the CPU")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second on the CPU")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    if options.vllm:
        report = {"vllm-cpu": asyncio.run(_cpu(options))}
        print(json.dumps(report))
        return 0
    report = {}
    for name in run_names(options.measured):
        report[name] = _gpu(options, name)
    layers = options.measured / "H100_Llama-3.1-8B_tp1_layers.csv.gz"
    if layers.exists():
        report["llama8b-h100 layers"] = _layers(layers)
    print(json.dumps(report))
    dense = [run["fitted"]["whole"] for run in report.values() if run.get("ranks") == 1]
    return int(any(abs(each[of]["errors"][0]) > 0.1 for each in dense for of in ("ttft_s", "tpot_s")))


def _gpu(options: argparse.Namespace, name: str) -> dict[str, Any]:
    meta = read_meta(options.measured, name)
    asked = meta["engine_kwargs"]
    cache = meta.get("kv_cache") or {}
    limits: dict[str, Any] = {
        "block_size": cache.get("block_size", 16),
        "max_num_batched_tokens": asked["max_num_batched_tokens"],
        "max_num_seqs": asked["max_num_seqs"],
        "async_scheduling": True,
    }
    if cache.get("num_kv_tokens"):
        # vLLM keeps one block as a placeholder that no request gets.
        limits["kv_tokens"] = cache["num_kv_tokens"] - limits["block_size"]
    card, model = name.split("_", 1)
    start = from_datasheet(name, CARDS[card], MODELS[model], **limits)
    run = read_run(options.measured, name, options.tokens, start.block_size)
    print(f"\n## {name}, vLLM {meta['vllm_version']}, {start.kv_tokens:,} KV tokens per rank")
    return _validated(options, name, run, start, ranks=asked["data_parallel_size"])


def _layers(path: Path) -> dict[str, Any]:
    """The shipped profile's prefill steps beside the sum of their kernels, measured one by one."""
    profile, measured = PROFILES["llama8b-h100"], read_layers(path, LLAMA_LAYERS)
    print(
        "\n## llama8b-h100 against its kernels\n\n| tokens | kernels ms | profile ms | |\n|---|---|---|---|"
    )
    steps = {}
    for tokens in (1, 64, 256, 512, 1024, 2048):
        ours = 1e3 * profile.step_s(tokens, tokens * tokens / 2, 0, 1)
        steps[str(tokens)] = {"kernels_ms": round(measured[tokens], 2), "profile_ms": round(ours, 2)}
        print(f"| {tokens} | {measured[tokens]:.1f} | {ours:.1f} | {ours / measured[tokens] - 1:+.0%} |")
    return steps


def _validated(
    options: argparse.Namespace,
    name: str,
    run: Run,
    start: EngineProfile,
    *,
    ranks: int = 1,
    constants: Sequence[str] = CONSTANTS,
    interleaved: bool = False,
) -> dict[str, Any]:
    """Fit to the first half; compare before and after, and every half; draw."""
    whole = range(len(run.loads))
    names = ("even requests", "odd requests") if interleaved else ("first half", "second half")
    first, second = (whole[::2], whole[1::2]) if interleaved else halves(run)
    begun_s = time.perf_counter()
    fitted = fit(start, run, first, ranks=ranks, constants=constants)
    took_s = time.perf_counter() - begun_s
    report: dict[str, Any] = {
        "ranks": ranks,
        "profile": {name: getattr(fitted.profile, name) for name in constants},
        "fit": {"plays": fitted.plays, "seconds": round(took_s, 1), "rms": round(fitted.error, 4)},
    }
    sync = replace(fitted.profile, async_scheduling=False)
    variants = {
        "start": (start, ("whole",)),
        "fitted": (fitted.profile, (*names, "whole")),
        "same, steps not composed ahead": (sync, (names[0], "whole")),
    }
    if not start.async_scheduling:
        del variants["same, steps not composed ahead"]
    parts: dict[str, Sequence[int]] = {names[0]: first, names[1]: second, "whole": whole}
    print(f"\nfitted on {len(first)} requests, {fitted.plays} plays in {took_s:.0f} s:")
    print(
        ", ".join(
            f"{f.name} {getattr(fitted.profile, f.name):.3g}" for f in fields(start) if f.name in constants
        )
    )
    print("\n| constants | requests | | mean | p50 | p90 | p99 | KS |\n|---|---|---|---|---|---|---|---|")
    for variant, (profile, judged) in variants.items():
        played = play(profile, run.loads, ranks)
        report[variant] = {part: compare(run, played, parts[part]).document() for part in judged}
        for part in judged:
            _print(variant, part, compare(run, played, parts[part]))
        if variant == "fitted":
            report["preemptions"] = played.preemptions
            report["gauges"] = gauge_errors(run, played)
            if options.plots is not None:
                from tokenway.simulator.validation.pictures import draw

                draw(options.plots / f"validation_{name}.png", name, run, played, whole)
    print(f"\npreemptions when played: {report['preemptions']}")
    print(f"gauges (mean, mean distance): {report['gauges']}")
    return report


def _print(variant: str, part: str, of: Comparison) -> None:
    for label, unit, spread in (
        ("TTFT s", 1.0, of.ttft_s),
        ("TPOT ms", 1e3, of.tpot_s),
        ("E2E s", 1.0, of.e2e_s),
    ):
        cells = (
            f"{unit * real:.3g} → {unit * ours:.3g} ({error:+.1%})"
            for real, ours, error in zip(spread.measured, spread.played, spread.errors, strict=True)
        )
        print(
            f"| {variant} | {part}, {of.requests} | {label} | {' | '.join(cells)} | {spread.distance:.3f} |"
        )


def _cpu_load(seed: int, seconds: float, requests_per_s: float) -> list[MeasuredRequest]:
    return mixed_load(
        random.Random(seed),
        seconds=seconds,
        requests_per_s=requests_per_s,
        prompt_tokens=(64, 1500),
        output_tokens=(8, 64),
        vocabulary=(300, 4000),
    )


def _waited_s() -> float:
    """Seconds since boot in which some process waited for a CPU, as Linux counts them."""
    some = Path("/proc/pressure/cpu").read_text(encoding="utf-8").split("\n")[0]
    return int(some.rpartition("total=")[2]) / 1e6


async def _cpu(options: argparse.Namespace) -> dict[str, Any]:
    """Start one real replica, load it, fit, and stop it."""
    load = _cpu_load(1, options.seconds, options.rate)
    folder = Path(tempfile.mkdtemp(prefix="twv", dir="/tmp"))
    replica = Vllm(folder, sorted(os.sched_getaffinity(0))[-1], "tcp")
    try:
        await replica.start()
        # What the first answers cost (allocations, lazy imports) is no part of the run.
        warming = [replace(asked, at_s=0.2 * index) for index, asked in enumerate(_cpu_load(0, 5.0, 2.0))]
        await measure(replica.url, SERVED_MODEL, warming, CPU_START.block_size)
        waited_s, begun_s = _waited_s(), time.monotonic()
        run = await measure(replica.url, SERVED_MODEL, load, CPU_START.block_size)
        waited = (_waited_s() - waited_s) / (time.monotonic() - begun_s)
        print(f"\n## vLLM on one of {os.cpu_count()} CPUs, {len(load)} requests")
        print(f"\nfor {waited:.0%} of the run some process of the machine waited for a CPU")
        early, late = (1e3 * compare(run, run, part).tpot_s.measured[0] for part in halves(run))
        print(f"\nmean TPOT of those that came in the first half {early:.1f} ms, in the second {late:.1f} ms")
        constants = (*CONSTANTS, "alpha0_ms")
        return _validated(options, "vllm-cpu", run, CPU_START, constants=constants, interleaved=True)
    finally:
        await replica.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
