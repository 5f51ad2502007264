"""What an adapter learned and what it forgot, measured on held-out rows with intervals."""
