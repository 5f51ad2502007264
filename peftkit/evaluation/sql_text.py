"""What the text of an SQL query tells before it runs: whether it orders its rows, and how far it may expand."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter

HINTS = (("word", "not"), ("word", "materialized"))
BEFORE_A_TABLE = frozenset([("word", "from"), ("word", "join"), ("word", "in"), ("mark", ","), ("mark", "(")])

_TOKEN = re.compile(
    r"""(?P<skip>[ \t\n\f\r]+|--[^\n]*|/\*.*?(?:\*/|\Z))
      | (?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\])
      | (?P<word>[A-Za-z_\x80-\U0010ffff][\w$\x80-\U0010ffff]*)
      | (?P<number>\d[\w.]*)
      | (?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)


def is_ordered(query: str) -> bool:
    """Whether a query orders its own rows: an ORDER BY outside all parentheses."""
    depth = 0
    for previous, token in itertools.pairwise([("mark", ""), *_tokens(query)]):
        if depth == 0 and previous == ("word", "order") and token == ("word", "by"):
            return True
        depth += (token == ("mark", "(")) - (token == ("mark", ")"))
    return False


def _tokens(query: str) -> list[tuple[str, str]]:
    """The tokens of a query without blanks and comments: (word | quoted | number | mark, text in lower case).

    Quoted text loses its quotes: SQLite takes 'a', "a", `a`, [a] and a for the same table.
    """
    found = []
    for match in _TOKEN.finditer(query):
        kind, text = str(match.lastgroup), match.group().lower()
        if kind == "quoted":
            text = text[1:-1].replace(text[0] * 2, text[0])
        if kind != "skip":
            found.append((kind, text))
    return found


def expansions(query: str) -> int:
    """An upper bound on the copies of WITH clauses that SQLite makes when it prepares a query.

    SQLite copies a common table expression at each place that names it, before any step is counted: eighteen of them,
    each naming the one before twice, are 650 characters and 238 MiB, and each further one doubles it (measured, SQLite
    3.40). The product over all definitions of the places that may name them is never below the true number.
    """
    tokens = [("mark", ""), *_tokens(query)]
    defined = [name for index in range(len(tokens)) if (name := _defined_before(tokens, index)) is not None]
    uses = Counter(
        token[1]
        for index, (previous, token) in enumerate(itertools.pairwise(tokens), start=1)
        if token[0] in ("word", "quoted") and previous in BEFORE_A_TABLE and index not in defined
    )
    return math.prod(max(1, uses[tokens[index][1]]) for index in defined)


def _defined_before(tokens: list[tuple[str, str]], index: int) -> int | None:
    """Where the name stands if the token is the AS of `name [(columns)] AS [[NOT] MATERIALIZED] (`, else None."""
    if tokens[index] != ("word", "as"):
        return None
    after = [token for token in tokens[index + 1 : index + 4] if token not in HINTS]
    if after[:1] != [("mark", "(")]:
        return None
    name = index - 1
    if tokens[name] == ("mark", ")"):
        while name > 0 and tokens[name] != ("mark", "("):
            name -= 1
        name -= 1
    return name if name > 0 and tokens[name][0] in ("word", "quoted") else None
