"""Small edits of texts and of tagged words that leave alone what a label is likely to hang on.

No edit touches a word with a digit, a mention, a hashtag, an address, markup, punctuation or an emoticon, nor anything
from a negation to the next punctuation mark, where it holds (Das & Chen 2001 mark the same words). Negations are known
in English, German, French and Spanish; of another language, use `mention` or nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_CORE = re.compile(r"""(["'(«„“‘]*)([^\W\d_]+(?:['’-][^\W\d_]+)*)([.,;:!?)"'»”’…]*)""")
_NEGATIONS = frozenset({
    "not", "no", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor", "cannot", "without", "hardly",
    "barely", "scarcely",
    "nicht", "kein", "keine", "keinen", "keinem", "keiner", "keines", "nie", "niemals", "nichts", "niemand", "ohne",
    "ne", "pas", "jamais", "rien", "aucun", "aucune", "sans",
    "ni", "nunca", "jamás", "nada", "nadie", "ningún", "ninguna", "sin",
})  # fmt: skip
_CONTRACTED = re.compile(
    r"(\w*n['’]t|(do|does|did|is|are|was|were|ca|could|should|would|wo|has|have|had|must|need)nt|n['’]\w+)"
)
_ENDS = frozenset(".,;:!?)…—–")


def _neighbours() -> dict[str, str]:
    """The letters beside each letter of a QWERTY keyboard, in its row and half a key further in the rows around."""
    found = {letter: set[str]() for row in _ROWS for letter in row}
    for row in _ROWS:
        for one, other in pairwise(row):
            found[one].add(other)
            found[other].add(one)
    for upper, lower in pairwise(_ROWS):
        for at, letter in enumerate(lower):
            for other in upper[at : at + 2]:
                found[letter].add(other)
                found[other].add(letter)
    return {letter: "".join(sorted(beside)) for letter, beside in found.items()}


NEIGHBOURS = _neighbours()


@dataclass(frozen=True)
class Words:
    """What edits need to know of all rows."""

    known: frozenset[str]
    """Every word, in lower case: a typo must not make one of them."""
    shared: frozenset[str]
    """Words that stand in rows of at least two targets: none tells its row's target by itself, so it may go."""

    @classmethod
    def of(cls, texts: Iterable[tuple[str, object]]) -> Words:
        """Of texts with their targets."""
        first: dict[str, object] = {}
        shared = set()
        for text, target in texts:
            for chunk in text.split():
                word = _plain(chunk)
                if first.setdefault(word, target) != target:
                    shared.add(word)
        return cls(frozenset(first), frozenset(shared))


def delete(text: str, rate: float, draw: random.Random, words: Words) -> str:
    """Leave out some words, each with the space before it; never more than half, and none that tells a target."""
    parts = _parts(text)
    chunks = parts[::2]
    free = [at for at in _free(chunks) if _core(chunks[at])[1] == chunks[at] and _plain(chunks[at]) in words.shared]
    gone = set(draw.sample(free, min(len(free), _many(rate, chunks), len(list(filter(None, chunks))) // 2)))
    kept = [part for at, part in enumerate(parts) if (at + 1) // 2 not in gone]
    return "".join(kept[1:] if 0 in gone else kept)


def swap(text: str, rate: float, draw: random.Random, words: Words) -> str:
    """Exchange some words with the next one."""
    parts = _parts(text)
    chunks = parts[::2]
    free = {at for at in _free(chunks) if _core(chunks[at])[1] == chunks[at]}
    for at in _pairs([at for at in sorted(free) if at + 1 in free], _many(rate, chunks), draw):
        parts[2 * at], parts[2 * at + 2] = parts[2 * at + 2], parts[2 * at]
    return "".join(parts)


def typo(text: str, rate: float, draw: random.Random, words: Words) -> str:
    """Hit the key beside the right one in some words of at least four letters, never in the first or last letter."""
    parts = _parts(text)
    chunks = parts[::2]
    free = [at for at in _free(chunks) if len(_core(chunks[at])[1]) > 3]
    for at in draw.sample(free, min(len(free), _many(rate, chunks))):
        before, core, after = _core(chunks[at])
        place = draw.randrange(1, len(core) - 1)
        letter = core[place]
        beside = NEIGHBOURS.get(letter.lower())
        if beside is None:
            continue
        other = draw.choice(beside)
        wrong = core[:place] + (other.upper() if letter.isupper() else other) + core[place + 1 :]
        if _plain(wrong) not in words.known and not _negates(wrong):
            parts[2 * at] = before + wrong + after
    return "".join(parts)


def case(text: str, rate: float, draw: random.Random, words: Words) -> str:
    """Turn the first letter of some words from small to capital, or back; a base that knows no case sees no edit."""
    parts = _parts(text)
    chunks = parts[::2]
    free = _free(chunks)
    for at in draw.sample(free, min(len(free), _many(rate, chunks))):
        before, core, after = _core(chunks[at])
        turned = core[0].swapcase()
        if len(turned) == 1:  # ß has two capital letters
            parts[2 * at] = before + turned + core[1:] + after
    return "".join(parts)


Mention = tuple[int, int, str]
"""First word, the word after the last, type."""
Tagged = tuple[tuple[str, ...], tuple[str, ...]]


def mentions(tags: Sequence[str]) -> list[Mention] | None:
    """The mentions of a row whose tags are BIO; None for tags of another scheme, such as parts of speech."""
    found: list[Mention] = []
    for at, tag in enumerate(tags):
        kind = tag[2:]
        if tag.startswith("I-") and found and found[-1][1:] == (at, kind):
            found[-1] = (found[-1][0], at + 1, kind)
        elif tag.startswith("B-"):
            found.append((at, at + 1, kind))
        elif tag != "O":
            return None
    return found


def mentions_by_type(rows: Iterable[Tagged]) -> dict[str, list[tuple[str, ...]]]:
    """The distinct mentions of each type in rows of words and their tags, in alphabetical order."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for words, tags in rows:
        for start, end, kind in mentions(tags) or ():
            found.setdefault(kind, set()).add(tuple(words[start:end]))
    return {kind: sorted(each) for kind, each in found.items()}


def replace_mentions(row: Tagged, rate: float, draw: random.Random, known: dict[str, list[tuple[str, ...]]]) -> Tagged:
    """Put other mentions of the same types in the places of some, and tag their words."""
    words, tags = list(row[0]), list(row[1])
    places = mentions(tags) or []
    chosen = draw.sample(places, min(len(places), _many(rate, places)))
    for start, end, kind in sorted(chosen, reverse=True):
        others = [each for each in known.get(kind, ()) if each != tuple(words[start:end])]
        if others:
            other = draw.choice(others)
            words[start:end] = other
            tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (len(other) - 1)]
    return tuple(words), tuple(tags)


def swap_outside(row: Tagged, rate: float, draw: random.Random) -> Tagged:
    """Exchange some words outside of mentions with the next one outside."""
    words, tags = list(row[0]), row[1]
    free = {at for at in _free(words) if tags[at] == "O"}
    for at in _pairs([at for at in sorted(free) if at + 1 in free], _many(rate, words), draw):
        words[at], words[at + 1] = words[at + 1], words[at]
    return tuple(words), tags


def _parts(text: str) -> list[str]:
    """Chunks at even places, the white space between them at odd ones; joined they are the text."""
    return re.split(r"(\s+)", text)


def _core(chunk: str) -> tuple[str, str, str]:
    """What stands before a word, the word, and what stands behind; an empty word for what must not be edited."""
    match = _CORE.fullmatch(chunk)
    return (match[1], match[2], match[3]) if match else (chunk, "", "")


def _plain(chunk: str) -> str:
    return (_core(chunk)[1] or chunk).casefold()


def _negates(chunk: str) -> bool:
    word = _plain(chunk)
    return word in _NEGATIONS or _CONTRACTED.fullmatch(word) is not None


def _free(chunks: Sequence[str]) -> list[int]:
    """The places of the words that may be edited."""
    found, negated = [], False
    for at, chunk in enumerate(chunks):
        negated = negated or _negates(chunk)
        if not negated and _core(chunk)[1]:
            found.append(at)
        if chunk and chunk[-1] in _ENDS:
            negated = False
    return found


def _many(rate: float, things: Sequence[object]) -> int:
    return max(1, round(rate * len(things)))


def _pairs(starts: Sequence[int], most: int, draw: random.Random) -> list[int]:
    """At most so many of these places, no two of them neighbours: a pair is a place and the next."""
    taken: list[int] = []
    for at in draw.sample(starts, len(starts)):
        if len(taken) < most and not {at - 1, at + 1} & set(taken):
            taken.append(at)
    return taken
