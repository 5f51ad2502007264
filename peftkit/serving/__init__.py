"""Serve adapters over HTTP: which names are answered by which versions, OpenAI's requests, a page to compare them."""
