"""What combining would do, told from the factors before it is done."""
