"""The name by which programs outside this repository know `testbed.redis_server`."""

from testbed.redis_server import running

__all__ = ["running"]
