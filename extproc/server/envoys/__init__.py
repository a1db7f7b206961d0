"""What Envoys are given: a bootstrap at their start, clusters and endpoints from then on."""
