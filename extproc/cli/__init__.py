"""The tokenway command."""
