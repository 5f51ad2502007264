"""Recall of the data audit on the planted faults, alarms per 1,000 real rows, and the time for 100,000 rows.

    python benchmarks/audit.py --data ../shared/data --base FOLDER

The planted set is `tests/data/planted`: each fault stands among clean rows, and each has a clean twin. Real rows come
from the folder of data sets that tests read through PEFTKIT_TEST_DATA. An alarm on a real row is not always false
(alpaca holds refusals, AG News remains of HTML): the rate bounds the false ones from above. The large file is made of
the real rows and of copies with a third of their words exchanged. Results go to benchmarks/results/audit.json.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftkit.base.tokenizer import Tokenizer, load_tokenizer
from peftkit.data.audit import Audit, DataSpec, inspect
from peftkit.environment import environment
from peftkit.errors import DataError

PLANTED = Path(__file__).parents[1] / "tests" / "data" / "planted"
RESULTS = Path(__file__).with_name("results") / "audit.json"
LIBRARIES = ("rensa", "detect-secrets", "phonenumbers", "python-stdnum", "py3langid", "ftfy")
Pair = dict[str, str]


def real_sets(data: Path) -> Iterator[tuple[str, list[Pair]]]:
    """Name and rows of each set, as prompts and completions."""
    for name, file in (
        ("rasbt", "rasbt_instruction/instruction-data.json"),
        ("alpaca_en", "llamafactory_demo/alpaca_en_demo.json"),
        ("alpaca_zh", "llamafactory_demo/alpaca_zh_demo.json"),
    ):
        rows = json.loads((data / file).read_text(encoding="utf-8"))
        yield name, [pair("\n".join(filter(None, (r["instruction"], r.get("input")))), r["output"]) for r in rows]
    lines = (data / "gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    yield "gsm8k", [pair(row["question"], row["answer"]) for row in map(json.loads, lines)]
    lines = (data / "sst2/train.tsv").read_text(encoding="utf-8").splitlines()
    rated = [line.split("\t") for line in lines]
    yield "sst2", [pair(f"Positive or negative?\n{text}", "positive" if r == "1" else "negative") for text, r in rated]
    for path in sorted((data / "t0_tasks").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        yield f"t0/{path.stem}", [pair(r["prompt"], r["completion"].replace("<|endoftext|>", "")) for r in rows]
    articles = json.loads((data / "xquad/xquad.en.json").read_text(encoding="utf-8"))["data"]
    asked = [(p["context"], q) for a in articles for p in a["paragraphs"] for q in p["qas"]]
    yield "xquad", [pair(f"{text}\n\n{q['question']}", q["answers"][0]["text"]) for text, q in asked]
    classes = (data / "ag_news/classes.txt").read_text(encoding="utf-8").split("\n")
    with open(data / "ag_news/test.csv", encoding="utf-8", newline="") as file:
        yield "ag_news", [pair(f"{title}\n{text}", classes[int(n) - 1]) for n, title, text in csv.reader(file)]
    both = [gzip.decompress((data / f"multi30k_en_de/val.{end}.gz").read_bytes()).decode() for end in ("en", "de")]
    captions = zip(*(text.splitlines() for text in both), strict=True)
    yield "multi30k", [pair(f"Translate into German: {english}", german) for english, german in captions]
    with open(data / "e2e_nlg/devset.csv", encoding="utf-8", newline="") as file:
        yield "e2e_nlg", [pair(meaning, text) for meaning, text in list(csv.reader(file))[1:]]


def pair(prompt: str, completion: str) -> Pair:
    return {"prompt": prompt, "completion": completion}


def write(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / f"{name.replace('/', '-')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def alarms(data: Path, folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any], list[Pair]]:
    """Alarms per set, alarms per 1,000 rows of all sets by rule, and all rows."""
    by_set, total, everything = {}, Counter[str](), []
    for name, given in real_sets(data):
        rows = [row for row in given if row["prompt"].strip() and row["completion"].strip()]
        result = inspect(DataSpec(train=write(folder, name, rows)), tokenizer, 8192)
        counts = {f.rule: f.count for f in result.findings if f.rule != "pad_is_stop"}
        by_set[name] = {"rows": len(rows), **counts}
        total.update(counts)
        everything += rows
    rates = {rule: round(1000 * count / len(everything), 3) for rule, count in total.most_common()}
    return by_set, rates, everything


def recall(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Found and planted faults by rule, and alarms on the clean twins; faults of special tokenizers are left out."""
    found, planted, noisy = Counter[str](), Counter[str](), Counter[str]()
    files = [file for file in sorted(PLANTED.glob("*.jsonl")) if file.stem not in ("background", "labels")]
    for fault in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        if fault.get("tokenizer") or fault["rule"] in (
            "no_stop",
            "little_to_learn",
            "length_outlier",
            "cut",
            "left_out",
        ):
            continue  # lengths that are counted in bytes of the tests' tokenizer: the tests hold them
        planted[fault["rule"]] += 1
        found[fault["rule"]] += fault["rule"] in rules(folder, fault, "rows", tokenizer)
        noisy.update(rules(folder, fault, "twin", tokenizer) - {"pad_is_stop"})
    return {
        "faults": sum(planted.values()),
        "found": sum(found.values()),
        "by_rule": {rule: f"{found[rule]}/{planted[rule]}" for rule in planted},
        "alarms_on_twins": dict(noisy),
    }


def rules(folder: Path, fault: dict[str, Any], side: str, tokenizer: Tokenizer) -> set[str]:
    """The rules that one side of a fault breaks; "reading" where a row or the file cannot be read."""
    prefix = "" if side == "rows" else "twin_"
    name = fault.get("background", "background")
    before = [] if fault.get("alone") else [json.loads(line) for line in (PLANTED / f"{name}.jsonl").open()]
    text = fault.get("fill") == "text"
    last = {"text": "A line of no matter."} if text else {"prompt": "Who rings?", "completion": "praise"}
    chat = [{"role": "user", "content": "Who rings?"}, {"role": "assistant", "content": "praise"}]
    held = fault.get(f"{prefix}held_out", [last if text else {"messages": chat}])
    settings = fault.get(f"{prefix}settings", fault.get("settings", {}))
    if f"{prefix}against" in fault:
        settings = {**settings, "against": write(folder, "against", fault[f"{prefix}against"])}
    files = {"train": write(folder, "rows", before + fault[side]), "held_out": write(folder, "held", held)}
    try:
        found = {finding.rule for finding in inspect(DataSpec(**files, **settings), tokenizer, None).findings}
        return {"reading" if rule == "unreadable" else rule for rule in found}
    except DataError:
        return {"reading"}


def large(rows: list[Pair], count: int) -> Iterator[Pair]:
    """So many rows: the real ones, then copies with a third of their words exchanged."""
    draw = random.Random(0)
    words = [word for row in rows[:2000] for word in " ".join(row.values()).split()]

    def vary(text: str) -> str:
        return " ".join(draw.choice(words) if draw.random() < 1 / 3 else word for word in text.split(" "))

    for index in range(count):
        row = rows[index % len(rows)]
        yield row if index < len(rows) else pair(vary(row["prompt"]), vary(row["completion"]))


def timed(path: str, base: Path) -> dict[str, Any]:
    """Seconds and memory of one audit in a process of its own."""
    code = "import sys; sys.path.insert(0, sys.argv[3]); from audit import measure; measure(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code, path, str(base), str(Path(__file__).parent)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(path: str, base: str) -> None:
    load = os.getloadavg()[0]  # of everything on the machine: above 1 the seconds are those of a shared one
    tokenizer = load_tokenizer(Path(base))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result: Audit = inspect(DataSpec(train=path), tokenizer, 8192)
    seconds = time.perf_counter() - start
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    rows, tokens = len(result.train.rows) + len(result.held_out.rows), result.train.tokens + result.held_out.tokens
    print(
        json.dumps(
            {
                "rows": rows,
                "megabytes": round(Path(path).stat().st_size / 1e6, 1),
                "tokens": tokens,
                "seconds": round(seconds, 1),
                "cpu_seconds_with_start": round(cpu, 1),
                "peak_rss_mb": round(peaks[0] / 1024),
                "peak_rss_mb_second_process": round(peaks[1] / 1024),
                "rss_mb_before": round(before / 1024),
                "load_before": round(load, 1),
            }
        )
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of real data sets")
    parser.add_argument("--base", type=Path, required=True, help="the folder of a base: its tokenizer renders the rows")
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        by_set, rates, rows = alarms(arguments.data, folder, tokenizer)
        result = {
            "planted": recall(folder, tokenizer),
            "alarms_per_1000_real_rows": rates,
            "real_rows": len(rows),
            "alarms_by_set": by_set,
            "time": [
                timed(write(folder, str(count), list(large(rows, count))), arguments.base)
                for count in (1_000, 10_000, arguments.rows)
            ],
            "libraries": {name: version(name) for name in LIBRARIES},
            "environment": environment(),
        }
    text = json.dumps(result, indent=1)
    print(text)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
