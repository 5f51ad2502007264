"""Many adapters in one batch: their factors stacked for each layer, applied to tokens by index."""
