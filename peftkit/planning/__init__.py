"""Memory, time and disk of a run as arithmetic, and the settings that fit a budget; no torch, no weights read."""
