"""Measured runs on disk, and the tokens of their requests.

A run is three files: `NAME_requests.jsonl`, `NAME_timeseries.csv` and `NAME_meta.json`.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from tokenway.simulator.engine.keys import block_keys
from tokenway.simulator.validation.measured import MeasurementError, Run, measured_run

_REQUESTS: Final = "_requests.jsonl"


def run_names(folder: Path) -> list[str]:
    """Names of the runs in a folder, sorted."""
    return sorted(path.name.removesuffix(_REQUESTS) for path in folder.glob(f"*{_REQUESTS}"))


def read_meta(folder: Path, name: str) -> dict[str, Any]:
    """What a run says about its engine.

    Raises:
        OSError: It cannot be read.
        MeasurementError: It is no JSON object.
    """
    return _object(folder / f"{name}_meta.json", (folder / f"{name}_meta.json").read_bytes())


def read_run(folder: Path, name: str, tokens: Path | None, block_size: int) -> Run:
    """A measured run.

    Args:
        folder: Where.
        name: Of the run; its time series may be missing.
        tokens: JSON lines `{input_tok_ids, output_tok_ids}` in the order of the run's requests, `.gz` or not.
            Where their lengths are not those of the run, they belong to another model and say nothing.
        block_size: Tokens per KV block.

    Raises:
        OSError: A file cannot be read.
        MeasurementError: A file's content is not of that form.
    """
    path = folder / f"{name}{_REQUESTS}"
    rows = [_object(path, line) for line in path.read_bytes().splitlines() if line.strip()]
    series = folder / f"{name}_timeseries.csv"
    gauges: list[dict[str, str]] = []
    if series.exists():
        with series.open(newline="", encoding="utf-8") as file:
            gauges = list(csv.DictReader(file))
    keys = {} if tokens is None else _keys(tokens, rows, block_size)
    try:
        return measured_run(rows, gauges, keys)
    except MeasurementError as error:
        raise MeasurementError(f"{path}: {error}") from None


def read_layers(path: Path, num_layers: int) -> dict[int, float]:
    """What the kernels of one step take together, from their timings one by one.

    Args:
        path: CSV, gzipped, of `layer_name, input (tokens), latency(ns)`: one prompt without context.
        num_layers: Of the model; embedding, final norm and head come once, the head for one token.

    Returns:
        Milliseconds by tokens in the step.

    Raises:
        OSError: The file cannot be read.
        MeasurementError: A column or a kernel is missing.
    """
    kernels: dict[int, dict[str, float]] = {}
    try:
        with gzip.open(path, "rt", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                kernels.setdefault(int(row["input"]), {})[row["layer_name"]] = float(row["latency(ns)"]) / 1e6
        head_ms = kernels[1]["lm_head"]
        steps = {}
        for tokens, parts in kernels.items():
            once_ms = parts["embedding"] + parts["final_layernorm"]
            layer_ms = sum(parts.values()) - once_ms - parts["lm_head"]
            steps[tokens] = once_ms + head_ms + num_layers * layer_ms
    except (KeyError, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise MeasurementError(f"{path}: {type(error).__name__}: {error}") from None
    return steps


def _keys(path: Path, rows: Sequence[dict[str, Any]], block_size: int) -> dict[int, tuple[int, ...]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    keys = {}
    with opener(path, "rb") as file:
        for index, (line, row) in enumerate(zip(file, rows, strict=False)):
            document = _object(path, line)
            try:
                prompt, output = document["input_tok_ids"], document["output_tok_ids"]
                ids = np.array([*prompt, *output], dtype=np.uint32)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise MeasurementError(f"{path}:{index + 1}: {type(error).__name__}: {error}") from None
            if (len(prompt), len(output)) == (row.get("input_toks"), row.get("output_toks")):
                keys[index] = tuple(block_keys(ids, block_size))
    return keys


def _object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MeasurementError(f"{path}: not JSON: {error}") from None
    if not isinstance(document, dict):
        raise MeasurementError(f"{path}: not a JSON object")
    return document
