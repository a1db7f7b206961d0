"""Rules of other gateways, one file each, with their sources: compared by the replayer, or live."""
