"""The demo: make the data, fine-tune in 4 bits, measure, keep the adapter, then ask it in a new process.

    python recipes/demo/run.py tickets            # a fixed budget of training tokens, 48 held-out rows
    python recipes/demo/run.py tickets sql --full # both tasks, all rows, and a swap between the two adapters

Every step is a command that you can run yourself; each is printed before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = Path("runs") / "demo-data"


def command(*arguments: str, given: str | None = None) -> None:
    """Print a peftkit command and run it in a process of its own; the demo ends when it fails."""
    print(f"\n$ peftkit {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "peftkit", *arguments], input=given, text=True, check=False).returncode
    if code != 0:
        raise SystemExit(code)


def train(task: str, full: bool) -> None:
    """Generate the rows of a task and fine-tune on them."""
    subprocess.run([sys.executable, str(HERE / f"{task}.py"), "--out", str(DATA)], check=True)
    everything = ("train.max_tokens=null", "data.max_held_out_rows=null", "evaluate.max_generated_rows=120")
    command("train", "qlora_sft", "--config", str(HERE / f"{task}.yaml"), *(everything if full else ()))


def held_out(task: str) -> tuple[str, str]:
    """System turn and question of the last held-out row: one that no run has trained on."""
    lines = (DATA / f"{task}.held_out.jsonl").read_text(encoding="utf-8").splitlines()
    messages = json.loads(lines[-1])["messages"]
    return messages[0]["content"], messages[1]["content"]


def main() -> None:
    """Run the demo for the tasks that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["tickets", "sql"])
    parser.add_argument("--full", action="store_true", help="all rows instead of a fixed budget of tokens")
    arguments = parser.parse_args()
    started = time.perf_counter()
    for task in arguments.tasks:
        train(task, arguments.full)
    command("list")
    print("\nA new process loads the adapter from the registry and answers a held-out question:")
    for task in arguments.tasks:
        system, question = held_out(task)
        print(f"\n{question}")
        command("chat", task, "--system", system, "--prompt", question)
    if len(arguments.tasks) > 1:
        print("\nOne process, one base in memory, three ways to answer: the first adapter, the second, the base.")
        question = " ".join(held_out(arguments.tasks[1])[1].split())
        turns = [question, "/new", f"/{arguments.tasks[1]}", question, "/new", "/base", question, "/quit"]
        command("chat", *arguments.tasks, "--max-new-tokens", "64", given="\n".join(turns) + "\n")
    print(f"\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; `peftkit runs list` shows what was kept")


if __name__ == "__main__":
    main()
