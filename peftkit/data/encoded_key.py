"""What encoded rows depend on: the ingredients of a key, so that a change of any of them is another key.

The rows themselves are digested as they were read, so whatever reading, splitting and cutting the set did is covered.
peftkit's part is digested as source text: whoever edits the encoder need not think of a version number.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftkit.base.tokenizer import Tokenizer
from peftkit.data.formats import Row
from peftkit.data.spec import DataSpec

_ENCODER = ("base/tokenizer.py", "data/chat.py", "data/template.py", "data/part.py", "data/encoded.py")
_ENCODING_LIBRARIES = ("tokenizers", "transformers", "jinja2")
_CHECKS = ("data/findings", "data/overlap.py")
_CHECKING_LIBRARIES = (
    "detect-secrets", "ftfy", "phonenumbers", "py3langid", "python-stdnum", "rensa",
)  # fmt: skip


def digest_rows(rows: Iterable[Row]) -> str:
    """SHA-256 of all that stands in rows, their places included, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        content = (row.messages, row.text, row.tools, row.chat_template_kwargs, row.columns, str(row.where))
        text = repr(content).encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def encoding_key(rows: str, tokenizer: Tokenizer, spec: DataSpec, length: int | None) -> dict[str, Any] | None:
    """The ingredients of encoded rows, `rows` being their digest; None where they cannot all be known.

    So it is with a tokenizer that has no file to digest, and with a template that asks for the time: Llama 3's writes
    the day into every prompt, and a day may end while rows are encoded.
    """
    template = json.dumps(tokenizer.hf.chat_template, sort_keys=True)
    if not tokenizer.hf.is_fast or "strftime_now" in template:
        return None
    rendering = spec.rendering
    return {
        "what": "encoded rows",
        "rows": rows,
        "tokenizer": _digest_tokenizer(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "rendering": [rendering.loss, rendering.think, rendering.template, _plain(rendering.kwargs)],
        "length": length,
        "too_long": spec.too_long,
        "encoder": _sources(_ENCODER),
        "libraries": _versions(_ENCODING_LIBRARIES),
    }


def checking_key(
    train: str, held_out: str, control: Collection[str], against: tuple[str, str] | None
) -> dict[str, Any]:
    """The ingredients of what the audit finds in the words of rows: digests of the rows, and the control tokens."""
    return {
        "what": "what the audit finds in words",
        "rows": [train, held_out],
        "control": list(control),
        "against": list(against) if against else None,
        "checks": _sources(_CHECKS),
        # What is a letter, and what prints, says its Unicode table.
        "python": list(sys.version_info[:2]),
        "libraries": _versions(_CHECKING_LIBRARIES),
    }


def _digest_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of the tokenizer's own file and of what transformers and peftkit add to it."""
    own = tokenizer.hf.backend_tokenizer.to_str()
    # Padding and truncation stand first; calls change them, and peftkit asks for neither.
    digest = hashlib.sha256(own[own.index('"added_tokens"') :].encode())
    hf = tokenizer.hf
    names = {name: str(value) for name, value in sorted(hf.special_tokens_map.items())}
    beside = [type(hf).__name__, names, list(tokenizer.stop_ids), tokenizer.control, tokenizer.bos]
    split = bool(getattr(hf, "split_special_tokens", False))
    digest.update(json.dumps([*beside, split], sort_keys=True).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """A setting as text that keeps the order of its keys: a template may show it."""
    return json.dumps(value, default=repr)


@cache
def _sources(names: Sequence[str]) -> str:
    """SHA-256 of peftkit's own files."""
    root = Path(__file__).parents[1]
    files = [path for name in names for path in (sorted((root / name).glob("*.py")) or [root / name])]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _versions(names: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
