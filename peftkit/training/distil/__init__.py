"""Distillation: learn from a teacher's whole distribution of the next token, and not from the answer alone."""
