"""llama.cpp reads a GGUF file: token ids of texts, logits, greedy answers. Run by the engine's own python.

Request: model, lora (a path or null), texts, forced (rows of ids whose logits are returned), prompts (rows of ids),
max_tokens, stop. Keys and values of attention are float32 here, as in the reference.
"""

import json
import sys

import llama_cpp
import numpy as np

_F32 = 0


_defaults = llama_cpp.llama_cpp.llama_model_default_params


def plain_buffers() -> object:
    """Weights as they lie in the file: repacked for AMX, 0.3.36 dies of SIGSEGV on a Q4_1 base without any adapter."""
    settings = _defaults()
    settings.use_extra_bufts = False
    return settings


def main() -> None:
    llama_cpp.llama_cpp.llama_model_default_params = plain_buffers
    request = json.load(sys.stdin)
    forced, prompts = request.get("forced", []), request.get("prompts", [])
    settings = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
    if forced or prompts:
        longest = max(len(row) for row in [*forced, *prompts]) + request.get("max_tokens", 0)
        settings |= {"n_ctx": longest + 8, "n_batch": longest + 8, "logits_all": True, "type_k": _F32, "type_v": _F32}
    else:
        settings["vocab_only"] = True
    model = llama_cpp.Llama(request["model"], lora_path=request.get("lora"), **settings)
    answer = {
        "version": llama_cpp.__version__,
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request.get("texts", [])],
        "with_bos": [model.tokenize(text.encode(), add_bos=True, special=True) for text in request.get("texts", [])],
        "forced": [logits(model, row).tolist() for row in forced],
        "answers": [greedy(model, row, request["max_tokens"], set(request["stop"])) for row in prompts],
    }
    print(json.dumps(answer))


def logits(model: llama_cpp.Llama, row: list[int]) -> np.ndarray:
    model.reset()
    model.eval(row)
    return np.asarray(model.scores[: len(row)], dtype=np.float64)


def greedy(model: llama_cpp.Llama, row: list[int], limit: int, stop: set[int]) -> list[int]:
    model.reset()
    model.eval(row)
    found: list[int] = []
    while len(found) < limit:
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        found.append(token)
        if token in stop:
            break
        model.eval([token])
    return found


main()
