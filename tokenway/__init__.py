"""On top of the external processor and the metadata center: the engine simulator and the replayer."""
