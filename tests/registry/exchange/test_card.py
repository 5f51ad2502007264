"""The card says what the manifest says, and no text of a manifest can say anything else on a page of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from registry.exchange.conftest import SECRET_ROW

from peftkit.errors import RegistryError
from peftkit.registry import Version
from peftkit.registry.exchange import card
from peftkit.registry.exchange.card import escape

HOSTILE = (
    'x"\n---\nlicense: mit\n---\n<script>alert(1)</script> | `rm` [a](http://evil.example) '
    "\x1b[31m\u202e![i](x) www.evil.example"
)


def parts(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_front_matter_is_what_the_hub_reads(version: Version) -> None:
    front, _ = parts(card(version, "apache-2.0"))
    assert front == {
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "datasets": ["acme/texts"],
        "tags": ["peftkit", "peft", "lora"],
    }
    assert "license" not in parts(card(version))[0]


def test_the_sections_hold_licences_counts_and_figures_with_intervals(version: Version) -> None:
    _, body = parts(card(version, "apache-2.0"))
    assert card(version) == card(version)
    for said in (
        "Licence: apache-2.0.",
        "| licence | apache-2.0 |",
        "| train | tickets.jsonl | 1,200 | 34,567 | 0 | " + "2" * 64 + " | not stated |",
        "| retention | acme/texts | 50 | – | 0 | " + "3" * 64 + " | cc0-1.0 |",
        "-0.412 &#91;-0.455, -0.371&#93;",
        "exact 0.25 on 40 rows",
        "exact 0.75 on 40 rows",
        "earlier&#64;0123456789abcdef",
        "NF4, bfloat16 compute",
        'AutoModelForCausalLM.from_pretrained("someone/base")',
        "peftkit import FOLDER --as tickets",
    ):
        assert said in body, said
    assert SECRET_ROW not in body


def test_hostile_text_stays_text(make_version: Callable[..., Version]) -> None:
    fields = make_version().manifest.base.model_dump() | {"source": HOSTILE, "license": HOSTILE}
    data = [{"role": "train", "source": HOSTILE, "sha256": "2" * 64, "rows": 1, "license": HOSTILE}]
    more = {"adapter": {HOSTILE: HOSTILE, "method": HOSTILE}, "environment": {HOSTILE: HOSTILE}}
    version = make_version("bad", base=fields, data=data, **more)
    front, body = parts(card(version))
    assert front == {"library_name": "peft", "tags": ["peftkit", "peft"]}
    for markup in ("<script", "](", "![", "\x1b", "\u202e", "http:", "www.", "\n---\nlicense"):
        assert markup not in body, markup
    rows = [line for line in body.splitlines() if "script" in line and line.startswith("|")]
    assert {line.count("|") for line in rows} == {3, 8}
    assert 'from_pretrained("BASE")' in body


@pytest.mark.parametrize(
    "source", ["../../etc/passwd", "a/b/c", "me/rows.jsonl", "tiny", "me/../x", "embedded:smollm2"]
)
def test_only_hub_ids_are_named_as_base_and_datasets(make_version: Callable[..., Version], source: str) -> None:
    fields = make_version().manifest.base.model_dump() | {"source": source}
    data = [{"role": "train", "source": source, "sha256": "2" * 64, "rows": 1}]
    front, _ = parts(card(make_version("own", base=fields, data=data)))
    assert not {"base_model", "datasets"} & set(front)


def test_a_licence_is_spelled_as_the_hub_spells_it(version: Version) -> None:
    with pytest.raises(RegistryError, match="no licence"):
        card(version, "mit\ntags: [x]")


def test_escape_keeps_plain_text_and_cuts_the_endless() -> None:
    assert escape("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert escape("2026-01-31T09:30:00Z lora_alpha (r=2)") == "2026-01-31T09:30:00Z lora_alpha (r=2)"
    assert escape("_x_ http://a WWW.b") == "&#95;x&#95; http&#58;//a WWW&#46;b"
    assert len(escape("a" * 9999)) == 300
    assert escape({"a": 1}) == "{&#34;a&#34;: 1}"
