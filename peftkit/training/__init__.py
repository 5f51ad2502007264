"""Training: one optimizer step, and supervised fine-tuning through TRL. Only this folder touches trl."""
