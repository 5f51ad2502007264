"""`peftkit serve` with 1 and 16 adapters against `transformers serve` with one, under 1, 8 and 64 clients.

    pip install 'transformers[serving]'      # the peer's own requirements
    python benchmarks/server.py              # about 10 minutes; nothing else should run meanwhile
    python benchmarks/server.py --quick      # whether all of it runs; writes nothing

The embedded base in float32 on 2 threads, random LoRA of rank 16 on all linear layers. Each server is a process of its
own, and the clients are another: a chat of 24 words, greedy, 32 tokens at most, streamed; a client asks again when it
has been answered. The first text is the first token that can be shown. Both servers get the same questions, and
`same_answers` says how many of one adapter's are equal, letter by letter. A line per measurement; all of them go to
benchmarks/results/server.json with versions and hardware.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server_load import Seen, asked, figures
from serving_mechanisms import backbone_of, random_adapters
from serving_misses import publish

from peftkit import locations
from peftkit.atomic import replace_file
from peftkit.backbone.locate import locate
from peftkit.base.ref import BaseSpec
from peftkit.environment import environment

RESULTS = Path(__file__).with_name("results") / "server.json"
ADAPTERS, THREADS = 16, "2"
CLIENTS = {1: 4, 8: 24, 64: 64}
"""How many clients, and how many requests they send in all."""
QUICK = {1: 1, 4: 4}
BASE = "embedded:smollm2-135m"


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests of everything; writes nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    loads = QUICK if options.quick else CLIENTS
    backbone = backbone_of()
    base, tokenizer = locate(BaseSpec(source=BASE), locations.cache_root().path).folder, backbone.tokenizer
    lines: list[dict[str, Any]] = []
    answers: dict[tuple[str, int], dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        registry = publish(random_adapters(backbone.model, ADAPTERS), scratch)
        names = [f"adapter-{i}" for i in range(ADAPTERS)]
        peer = _folder_for_transformers(registry.resolve(names[0]).path, base, scratch / "peer")
        ways = {
            "peftkit serve, 1 adapter": (_ours(registry.root, names[:1]), names[:1]),
            f"peftkit serve, {ADAPTERS} adapters": (_ours(registry.root, names), names),
            "transformers serve": (_theirs(peer), [str(peer)]),
            "transformers serve, continuous batching": (_theirs(peer, "--continuous-batching"), [str(peer)]),
        }
        del backbone
        for way, (command, models) in ways.items():
            with running(command, scratch / "server.log") as address:
                asyncio.run(asked(address, models, 1, len(models)))  # adapters are loaded, threads started
                for clients, requests in loads.items():
                    seen, seconds = asyncio.run(asked(address, models, clients, requests))
                    answers[way, clients] = {each.prompt: each.text for each in seen}
                    line = {"what": way, "clients": clients, **figures(seen, seconds, _counter(tokenizer))}
                    line |= _same(seen, answers.get((next(iter(ways)), clients), {}), len(models))
                    lines.append(line)
                    print(json.dumps(line), flush=True)
            if not options.quick:  # kept way by way, so that one that fails costs the others nothing
                kept = {"threads": int(THREADS), "lines": lines, "environment": environment()}
                replace_file(options.results, json.dumps(kept, indent=1) + "\n")


def _same(seen: Sequence[Seen], known: dict[str, str], models: int) -> dict[str, float]:
    """The share of answers that are those of `peftkit serve` with one adapter, where there is one."""
    if models > 1 or not known:
        return {}
    return {"same_answers": round(sum(known[each.prompt] == each.text for each in seen) / len(seen), 3)}


def _counter(tokenizer: Any) -> Any:
    return lambda text: len(tokenizer.encode(text))


def _ours(registry: Path, names: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "peftkit", "serve", *names, "--base", BASE, "--bits", "32"]
    return [*command, "--registry", str(registry), "--port", "{port}"]


def _theirs(folder: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--dtype", "float32"]
    return [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", "{port}", *more]


def _folder_for_transformers(adapter: Path, base: Path, folder: Path) -> Path:
    """The adapter beside its whole base: the one layout of which transformers' server loads both."""
    shutil.copytree(adapter, folder)
    for found in base.iterdir():
        (folder / found.name).symlink_to(found)
    return folder


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[str]:
    """The address of a server, once it says that it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environ = {**os.environ, "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        arguments = [part.format(port=port) for part in command]
        server = subprocess.Popen(arguments, env=environ, stdout=output, stderr=output)
        try:
            _wait(server, address, log)
            yield address
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            sys.exit(f"the server ended:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    sys.exit(f"the server did not answer within five minutes:\n{log.read_text(errors='replace')[-3000:]}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
