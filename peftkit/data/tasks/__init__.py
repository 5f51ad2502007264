"""Rows of the classic tasks: read and checked, encoded for a head, and outputs turned back into answers."""
