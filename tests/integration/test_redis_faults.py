"""What a real redis-server refuses is said with what to do, and by the keys of the configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from metadata_center.sharing.messages import Row, Update, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.transport import TransportError
from metadata_center.types import EndpointKey
from testbed.redis_server import RedisServer, running

UPDATE = Update(member_id("gw1", 0, "x"), 1, (Row(EndpointKey("10.0.0.1:8000"), 1),), True, 6.0, (), False)

WEAK = ("reset", "resetchannels", "on", ">s3cret", "~{tokenway}:*", "&{tokenway}:*")
SET_UP: dict[str, Sequence[Sequence[str]]] = {
    "open": (),
    "closed": (("CONFIG", "SET", "requirepass", "s3cret"),),
    "full": (("CONFIG", "SET", "maxmemory", "1000"),),
    "mute": (("ACL", "SETUSER", "gw", *WEAK),),
    "by script": (("ACL", "SETUSER", "gw", *WEAK, "+evalsha", "+eval", "+publish"),),
}


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """One that was set up."""
    with running(tmp_path) as server:
        for command in SET_UP[request.param]:
            assert server.command(*command) == b"+OK\r\n"
        yield server


@pytest.mark.parametrize(
    ("server", "url", "says"),
    [
        ("closed", "redis://{}", "metadata_center.password_env"),
        ("closed", "redis://:wr0ng@{}", "metadata_center.password_env"),
        ("closed", "redis://gw:wr0ng@{}", "metadata_center.username"),
        ("open", "redis://:wr0ng@{}", "the server has no password"),
        ("open", "redis://{}/99", "the number at the end of metadata_center.url"),
        ("open", "redis+sentinel://{}/main", "metadata_center.url names a server where a sentinel should be"),
        ("open", "rediss://{}?ca_certs=/none.pem", "ca_certs, certfile and keyfile in metadata_center.url"),
        ("full", "redis://{}", "raise maxmemory"),
        ("mute", "redis://gw:s3cret@{}", "the rights that docs/metadata-center.md lists"),
        ("by script", "redis://gw:s3cret@{}", "the rights that docs/metadata-center.md lists"),
    ],
    indirect=["server"],
)
async def test_a_refusal_says_what_to_do(server: RedisServer, url: str, says: str) -> None:
    """And shows no password."""
    transport = RedisTransport(parse_url(url.format(server.url.removeprefix("redis://"))))
    try:
        with pytest.raises(TransportError) as refused:
            async with asyncio.timeout(10):
                await transport.publish(UPDATE)
    finally:
        await transport.close()
    assert says in str(refused.value)
    assert "s3cret" not in str(refused.value)
    assert "wr0ng" not in str(refused.value)
