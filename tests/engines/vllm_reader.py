"""vLLM's greedy tokens for adapters over one base. Run by the engine's own python; JSON in, JSON out.

Request: base, adapters ({name: folder}), prompts (rows of ids), tokens, max_lora_rank. The base alone answers under the
empty name; an adapter that vLLM refuses stands under `refused` with its reason.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# What vLLM writes to stdout while it starts must not stand before the answer.
_STDOUT = os.dup(1)
os.dup2(2, 1)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Load the base once and ask it with every adapter in turn."""
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    adapters = asked["adapters"]
    engine = vllm.LLM(
        model=asked["base"],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=max(1, len(adapters)),
        max_lora_rank=asked["max_lora_rank"],
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
    answers, refused = {}, {}
    for number, (name, folder) in enumerate([("", None), *adapters.items()]):
        request = LoRARequest(name, number, folder) if folder else None
        try:
            if request is not None:
                engine.llm_engine.add_lora(request)
            found = engine.generate(prompts, settings, lora_request=request, use_tqdm=False)
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        answers[name] = [_shown(each.outputs[0]) for each in found]
    return {"version": vllm.__version__, "torch": torch.__version__, "answers": answers, "refused": refused}


def _shown(output: Any) -> dict[str, Any]:
    tokens = list(output.token_ids)
    chosen = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": chosen}


if __name__ == "__main__":
    answered = json.dumps(answer(json.load(sys.stdin)))
    with os.fdopen(_STDOUT, "w") as stdout:
        stdout.write(answered + "\n")
    os._exit(0)  # vLLM's threads print more while the interpreter ends
