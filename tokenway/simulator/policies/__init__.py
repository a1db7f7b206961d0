"""Routing rules: what a rule may see (`view`), the rivals, one file each, and their names (`registry`)."""
