"""Training a task's head: its losses, and how its rows go through the model."""
