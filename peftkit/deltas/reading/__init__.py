"""Adapter files as deltas: every PEFT method that has a ΔW, and kind `tensors`."""
