"""Parts of a merge: what is written where, tensor by tensor, and what was kept of the delta."""
