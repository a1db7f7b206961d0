"""The process itself: its turns, its memory, its environment, its helpers."""
