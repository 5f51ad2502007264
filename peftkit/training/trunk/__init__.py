"""Training with the hidden states of a frozen trunk computed once."""
