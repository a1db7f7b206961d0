"""Write the shipped sample anew: `python -m tokenway.simulator.replay.samples.make`."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import orjson

from tokenway.simulator.replay.export import records
from tokenway.simulator.replay.generators import sample
from tokenway.simulator.replay.sources import SAMPLE_FILE

BLOCK_TOKENS = 256
"""Coarse, so that the file stays at a few kilobytes."""


def content() -> bytes:
    """The sample, uncompressed; the same every time."""
    lines = records(sample(Random("sample")), BLOCK_TOKENS)
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


if __name__ == "__main__":
    path = Path(__file__).parent / SAMPLE_FILE
    path.write_bytes(gzip.compress(content(), mtime=0))
