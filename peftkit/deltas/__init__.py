"""Adapter tensors as changes of the base: exact ΔW, combining, preview, and merging tensor by tensor."""
