"""gRPC over HTTP/2, server side, without I/O: bytes and times in, calls told, bytes out."""
