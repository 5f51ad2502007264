"""Adapters that leave and enter a registry: export, import, push and pull (FORMAT.md, section 7)."""

from peftkit.registry.exchange.card import card
from peftkit.registry.exchange.export import Piece, export, pieces
from peftkit.registry.exchange.hub import Hub, parse
from peftkit.registry.exchange.importing import FindBase, import_adapter
from peftkit.registry.exchange.pull import pull
from peftkit.registry.exchange.push import Arrival, Parcel, Pushed, compare, prepare, push_to_folder, send
from peftkit.registry.exchange.taking import ImportBase

__all__ = [
    "Arrival",
    "FindBase",
    "Hub",
    "ImportBase",
    "Parcel",
    "Piece",
    "Pushed",
    "card",
    "compare",
    "export",
    "import_adapter",
    "parse",
    "pieces",
    "prepare",
    "pull",
    "push_to_folder",
    "send",
]
