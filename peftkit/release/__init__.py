"""Combine, merge and export adapters, with measured receipts and a gate."""
