"""The server around the routes: who may ask, how much and how long; start, signals, drain."""
