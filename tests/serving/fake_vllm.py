"""A vLLM without a model: the routes that the server uses, written from the sources of vLLM 0.32.0.

It answers with letters that depend on the adapter's bytes and the prompt, so that a test can say what is right. Run as
`fake_vllm.py serve BASE …`. In the folder FAKE_VLLM it notes what it hears (`heard.jsonl`), and looks for what a test
wants: `hold` keeps answers from going on, `slow` keeps adapters from being loaded and `full` refuses them, `die` ends
it at once.

Read for it: entrypoints/openai/completion/{protocol,serving,api_router}.py, entrypoints/openai/models/serving.py,
entrypoints/serve/{lora/api_router,instrumentator/basic,instrumentator/health,instrumentator/metrics}.py and
v1/core/sched/utils.py.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

FAILING, REFUSED, ENDLESS = 0, 100, 101
"""A prompt that begins with one of these fails on its way, is refused, or has an answer that goes on and on."""
_FIRST_LETTER = 3 + ord("a") - ord("!")  # in the tokenizer of tests/tiny_bases.py


def letters(weights: bytes, prompt: Sequence[int]) -> list[int]:
    """The tokens of an answer that ends by itself; an adapter is known by its file of tensors, the base by none."""
    digest = hashlib.sha256(weights + bytes(token % 256 for token in prompt)).digest()
    return [_FIRST_LETTER + byte % 26 for byte in digest[: 6 + digest[0] % 8]]


class Fake:
    """Its state, and its routes."""

    def __init__(self, base: str, rank: int, positions: int) -> None:
        self.folder = Path(os.environ["FAKE_VLLM"])
        self.base, self.rank, self.positions = base, rank, positions
        self.adapters: dict[str, str] = {}
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.running = 0

    def note(self, what: str, **more: Any) -> None:
        with (self.folder / "heard.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, **more}) + "\n")

    def die_if_asked(self) -> None:
        if (self.folder / "die").exists():
            sys.stderr.write("RuntimeError: no memory left\n")
            sys.stderr.flush()
            os._exit(3)

    def app(self) -> Starlette:
        routes = [
            Route("/health", lambda _: Response()),
            Route("/version", lambda _: JSONResponse({"version": "0.32.0"})),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        return Starlette(routes=routes)

    async def metrics(self, request: Request) -> Response:
        lines = ["# TYPE vllm:num_requests_running gauge"]
        lines += [f'vllm:num_requests_running{{engine="0",model_name="base"}} {float(self.running)}']
        lines += ['vllm:num_requests_waiting{engine="0",model_name="base"} 0.0']
        lines += ['vllm:num_requests_waiting_by_reason{engine="0",model_name="base",reason="capacity"} 5.0']
        return PlainTextResponse("\n".join(lines) + "\n")

    async def models(self, request: Request) -> Response:
        cards: list[dict[str, Any]] = [{"id": "base", "root": self.base, "max_model_len": self.positions}]
        cards += [{"id": name, "root": path, "max_model_len": None} for name, path in self.adapters.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def load(self, request: Request) -> Response:
        asked = await request.json()
        name, path = asked["lora_name"], asked["lora_path"]
        self.note("load", name=name, path=path)
        async with self.locks[name]:
            while (self.folder / "slow").exists():
                await asyncio.sleep(0.005)
            return self.loaded(name, path)

    def loaded(self, name: str, path: str) -> Response:
        if name in self.adapters or name == "base":
            return error(f"The lora adapter '{name}' has already been loaded.", 400)
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        if config["r"] > self.rank:
            return error(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.", 500)
        if (self.folder / "full").exists():
            return error("Call to add_lora method failed: no memory", 500)
        self.adapters[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.note("unload", name=name)
        async with self.locks[name]:
            if name not in self.adapters:
                return error(f"The lora adapter '{name}' cannot be found.", 404)
            del self.adapters[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        self.note("complete", body=asked)
        if asked["model"] not in {"base", *self.adapters}:
            return error(f"The model `{asked['model']}` does not exist.", 404)
        if asked["prompt"][0] == REFUSED:
            return error("This model's maximum context length is 512 tokens.", 400)
        return StreamingResponse(self.stream(asked), media_type="text/event-stream")

    async def stream(self, asked: dict[str, Any]) -> AsyncIterator[str]:
        """One chunk for each token; the last one has the reason why it is the last."""
        ended, self.running = False, self.running + 1
        try:
            folder = self.adapters.get(asked["model"])  # settled now, as vLLM's LoRARequest is
            assert all(asked[flag] for flag in ("ignore_eos", "stream", "return_token_ids"))
            stop = asked["stop_token_ids"][0]
            found = letters(weights_of(folder), asked["prompt"])
            tokens = itertools.cycle(found) if asked["prompt"][0] == ENDLESS else [*found, stop]
            for at, token in enumerate(tokens, 1):
                await asyncio.sleep(0.001)
                while (self.folder / "hold").exists():
                    await asyncio.sleep(0.005)
                weights_of(folder)  # vLLM may have evicted it, and reads it again
                if asked["prompt"][0] == FAILING and at == 2:
                    yield event({"error": {"message": "Internal server error", "code": 500}})
                    break
                reason = "stop" if token == stop else "length" if at >= asked["max_tokens"] else None
                yield event({"choices": [choice(token, at, reason, asked)]})
                if reason:
                    break
            ended = True
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            if not ended:
                self.note("aborted", model=asked["model"])


def choice(token: int, at: int, reason: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"index": 0, "text": "not read", "token_ids": [token], "finish_reason": reason}
    if (wanted := asked.get("logprobs")) is not None:
        assert asked["return_tokens_as_token_ids"]
        value = -at / 8
        top = {f"token_id:{token}": value} | {f"token_id:{200 + n}": -n / 16 for n in range(wanted)}
        found["logprobs"] = {"tokens": [f"token_id:{token}"], "token_logprobs": [value], "top_logprobs": [top]}
    return found


def weights_of(folder: str | None) -> bytes:
    return b"" if folder is None else (Path(folder) / "adapter_model.safetensors").read_bytes()


def event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def error(message: str, status: int) -> Response:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "code": status}}, status)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("base")
    parser.add_argument("--uds", required=True)
    parser.add_argument("--max-lora-rank", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, default=512)
    arguments, _ = parser.parse_known_args()
    fake = Fake(arguments.base, arguments.max_lora_rank, arguments.max_model_len)
    wanted = ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE")
    environment = {name: os.environ[name] for name in wanted}
    fake.note("start", arguments=sys.argv[1:], pid=os.getpid(), environment=environment)
    fake.die_if_asked()
    server = uvicorn.Server(uvicorn.Config(fake.app(), uds=arguments.uds, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not serving.done():
        fake.die_if_asked()
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main())
