"""The page at `/`: one prompt to base and adapters side by side, what is known of each, and how to move them."""
