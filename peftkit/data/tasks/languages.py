"""The language that a translation is into, told by what its column or its file is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftkit.data.readers import SUFFIXES
from peftkit.data.tasks.parallel import halves

_TABLES = tuple(suffix for suffix in SUFFIXES if suffix != ".txt")

_NAMES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi",
    "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "la": "Latin",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian",
    "mr": "Marathi", "ms": "Malay", "mt": "Maltese", "my": "Burmese", "nb": "Norwegian", "ne": "Nepali",
    "nl": "Dutch", "nn": "Norwegian", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "ps": "Pashto",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian",
    "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil",
    "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek",
    "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
"""ISO 639-1."""
_LONG = {
    "ara": "ar", "ces": "cs", "cze": "cs", "dan": "da", "deu": "de", "ger": "de", "ell": "el", "eng": "en",
    "fas": "fa", "fin": "fi", "fra": "fr", "fre": "fr", "heb": "he", "hin": "hi", "hun": "hu", "ind": "id",
    "ita": "it", "jpn": "ja", "kor": "ko", "nld": "nl", "nob": "nb", "pol": "pl", "por": "pt", "ron": "ro",
    "rus": "ru", "spa": "es", "swe": "sv", "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi", "zho": "zh",
}  # fmt: skip
"""ISO 639-2 and -3, as NLLB's and Tatoeba's sets have them."""


def language(word: str) -> str | None:
    """The English name of a language, written as a code (de, pt-BR, zho_Hans) or by that name; None otherwise."""
    word = word.casefold()
    if word.capitalize() in _NAMES.values():
        return word.capitalize()
    code = word.replace("_", "-").partition("-")[0]
    return _NAMES.get(_LONG.get(code, code))


def target_language(source: str, column: str | None) -> str | None:
    """The language of the targets of a source: of two files by the ending of the second, else by the column's name."""
    both = halves(source)
    words: Sequence[str] = Path(both[1]).name.split(".")[:0:-1] if both else [column or ""]
    return next(filter(None, map(language, words)), None)


def recorded_language(source: str, column: str | None) -> str | None:
    """As `target_language`, of a source as a manifest names it: of two files with their folders the second alone."""
    found = target_language(source, column)
    table = any(suffix in _TABLES for suffix in Path(source).suffixes)
    return found if found is not None or "+" in source or table else target_language(f"+{source}", None)
