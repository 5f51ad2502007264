"""Rows: read from files or the Hub, recognised, rendered with their loss mask, audited and split; imports no torch."""
