"""Rows that say which answer is better: two answers to one prompt, or one answer and whether it is wanted."""
