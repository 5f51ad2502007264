"""OpenAI's protocol: what a request asks for, what it is answered with, and the routes."""
