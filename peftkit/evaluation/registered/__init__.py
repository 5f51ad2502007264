"""Registered adapters against their base on further rows, of the kind that each was trained on."""
