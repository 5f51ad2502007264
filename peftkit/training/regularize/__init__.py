"""Regularizers: what is added to the loss, to the gradients or to the passes of a training step."""
