"""Which words a prediction comes from: integrated gradients of a task's head, summed to words, as figures or a page."""
