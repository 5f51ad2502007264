"""Which adapters are in the bank, in host memory, or on disk, and which have a model of their own."""
