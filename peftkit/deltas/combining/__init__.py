"""Several deltas as one: the methods, and what brings their results to a rank."""
