"""Classic tasks measured from their predictions: scores with intervals, trivial baselines beside them, slices."""
