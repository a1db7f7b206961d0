"""What a request costs, counted in what is made of it: a small multiple of its bytes, whatever it holds."""

from __future__ import annotations

import random

import pytest

from benchmarks.worst_bodies import PIECES, PLACES, Shape, mutated, shapes
from extproc.errors import RouterError
from extproc.request.blocks import BLOCK_BYTES, MAX_BLOCKS, block_hashes
from extproc.request.media import MAX_WIDTH_BYTES
from extproc.request.reading import ReadOrder, read_body

PROMPT_FACTOR = 4
"""Bytes of canonical prompt per byte of body: a tool without fields gets those that the engine renders."""

SENT_FACTOR = 7
"""Bytes sent per byte of body: "1e9" is written as 1000000000.0."""

SLACK_BYTES = 256


def check(shape: Shape, num_bytes: int) -> bool:
    """Read one body and compare what was made with what came; False if it was refused."""
    path, body = shape.body(num_bytes)
    try:
        read = read_body(ReadOrder(path, frozenset(), True, frozenset({"m"}), MAX_BLOCKS * BLOCK_BYTES), body)
    except RouterError as error:
        assert error.status in (400, 413)  # noqa: PT017 - most are served
        return False
    request = read.request
    assert len(request.prompt) <= PROMPT_FACTOR * len(body) + SLACK_BYTES, shape
    assert request.prompt_bytes <= PROMPT_FACTOR * len(body) + SLACK_BYTES + MAX_WIDTH_BYTES, shape
    assert len(request.widths) * len(b'{"file_id":""}') <= len(body)
    blocks = block_hashes(request.prompt, 1, widths=request.widths)
    assert len(blocks) == min(MAX_BLOCKS, request.prompt_bytes // BLOCK_BYTES)
    new_body = read.new_body("m")
    assert new_body is not None
    assert sum(map(len, new_body)) <= SENT_FACTOR * len(body) + SLACK_BYTES, shape
    return True


@pytest.mark.parametrize("num_bytes", [3_000, 70_000])
@pytest.mark.parametrize("place", PLACES)
def test_every_piece_in_every_place_makes_little_of_what_came(place: str, num_bytes: int) -> None:
    """All APIs and fields, filled with each of the pieces that have cost much before."""
    known = [shape for shape in shapes() if shape.place == place]
    assert len(known) == len(PIECES)
    assert sum(check(shape, num_bytes) for shape in known) > 0


def test_mixtures_make_little_of_what_came() -> None:
    """Thousands of mixtures of those pieces, nested in each other, as the fuzzer makes them."""
    rng = random.Random(9)
    shape = Shape("chat.content", (b"[]",))
    served = 0
    for number in range(2000):
        if number % 10 == 0:
            shape = Shape(rng.choice(tuple(PLACES)), (rng.choice(PIECES),))
        shape = mutated(shape, rng)
        served += check(shape, rng.choice((600, 2_000, 6_000)))
    assert served > 600
