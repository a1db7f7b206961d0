"""What a redis-server says of itself."""

from __future__ import annotations

from testbed.redis_server import RedisServer


class Redis:
    """Readings of a redis-server."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def info(self) -> dict[str, float]:
        """All numbers of INFO."""
        found: dict[str, float] = {}
        for section in ("cpu", "stats", "memory", "clients"):
            for line in self._server.command("INFO", section).decode().splitlines():
                name, _, number = line.partition(":")
                if number.replace(".", "", 1).isdigit():
                    found[name] = float(number)
        return found

    def memory_usage(self, key: str) -> int:
        """Bytes of one key, all of its fields looked at."""
        return int(self._server.command("MEMORY", "USAGE", key, "SAMPLES", "0").strip()[1:])


def used_cpu_s(info: dict[str, float]) -> float:
    """CPU seconds of Redis so far, of what `Redis.info` found."""
    return info["used_cpu_sys"] + info["used_cpu_user"]
