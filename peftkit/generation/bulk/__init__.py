"""Every row of a file answered; answers kept as they come."""
