"""The engine core: a continuous-batching scheduler and its prefix cache in virtual time."""
