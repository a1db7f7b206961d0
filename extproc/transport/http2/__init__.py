"""gRPC over HTTP/2, server side, without I/O: bytes and times in, events of calls and bytes out."""
