"""A real base behind OpenAI's client: it knows a capital, and writes JSON by a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from generation.adapters_lab import Lab
from serving.server_lab import Server, serving

pytestmark = [pytest.mark.base, pytest.mark.loopback]

ASKED: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def real(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(Lab(tmp_path_factory.mktemp("real"), embedded)) as running:
        yield running


def test_a_real_base_answers_and_writes_json(real: Server) -> None:
    schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"],
              "additionalProperties": False}  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with openai.OpenAI(base_url=f"{real.address}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "base", "messages": ASKED, "temperature": 0}
        whole = client.chat.completions.create(**asked, max_tokens=12)
        assert "Paris" in (whole.choices[0].message.content or "")
        assert whole.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(**asked, max_tokens=12, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
        found = client.chat.completions.create(**asked, max_tokens=60, response_format=form)
        assert "Paris" in json.loads(found.choices[0].message.content or "")["capital"]
        assert found.choices[0].finish_reason == "stop"
