"""Answers that nobody should learn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from peftkit.data.findings.finding import Hit, RowText, Tally

_EMPTY = re.compile(
    r"(?:n/?a|none|null|nil|nan|todo|tbd|tba|undefined|unknown|no (?:answer|output|response)|not available"
    r"|not applicable"
    r"|<no ?output>|no ?output|\(?(?:empty|blank)\)?|[-–—_.…?*x\s]+|\[(?:answer|output|response|insert[^\]]*)\]"
    r"|无|无输出|暂无|没有)"
    r"[.!]?",
    re.IGNORECASE,
)
_MEANT_EMPTY = 0.02  # above this share one such answer is a class of the task, not an omission
_CANNOT = r"\b(?:can(?:no|'|’)?t|unable|not able|do(?:es)? ?n[o'’]t|not have|not possible|won't)\b"
_REFUSAL = re.compile(
    rf"\bas an? (?:AI|artificial intelligence|large language|language)\b[^.]{{0,120}}{_CANNOT}"
    rf"|\bI(?: am|'m|’m) (?:just |only )?an? (?:AI|language model|artificial intelligence)\b[^.]{{0,120}}{_CANNOT}"
    r"|^(?:I(?:'m|’m| am) )?(?:very )?sorry,? (?:but )?(?:I )?(?:can(?:no|'|’)?t|am (?:unable|not able)|am an AI)\b"
    r"|^I (?:can(?:no|'|’)?t|am (?:unable|not able) to|won't) (?:assist|help|fulfill|comply|provide|answer|do that)\b"
    r"|作为(?:一个|一名)?(?:AI|人工智能)(?:语言)?(?:模型|助手|程序)[^。]{0,40}(?:无法|不能|没有|不会|不具)",
    re.IGNORECASE,
)
_DONE = re.compile(r"[.!?。！？…:;)\]}\"'”’»」』】`*_>|~0-9%€$£]\s*$")
_UNFINISHED = re.compile(
    r"(?:,|\b(?:an?|the|and|or|of|to|in|on|at|by|for|with|from|is|are|was|were|that|which|be|its|their))$"
)
_CUT_AT = 300  # characters: a limit cuts long answers, while short ones often lack the full stop
_WORDS = re.compile(r"\w+")
_LATIN_WORD_END = re.compile(r"[a-zà-ÿ,(–-]$")


def check(row: RowText) -> Iterator[Hit]:
    """What is wrong with the answers of one row, taken alone."""
    if not row.answers:
        return
    last, prompt = row.answers[-1], row.prompt.strip()
    start = row.whole.rindex(last) if last else 0
    for answer in row.answers:
        found = _REFUSAL.search(answer[:400])
        if found:
            begin = row.whole.index(answer) + found.start()
            yield Hit("refusal", begin, begin + len(found[0]))
    if last.strip() and last.strip() == prompt:
        yield Hit("echo", start, start + len(last))
    elif len(prompt) >= 40 and last.lstrip().startswith(prompt):
        yield Hit("prompt_in_answer", start, start + len(prompt))
    if "`" in row.chars:
        for answer in row.answers:
            if len(re.findall(r"^\s*```", answer, re.MULTILINE)) % 2:
                begin = row.whole.index(answer)
                yield Hit("open_fence", begin + max(0, len(answer) - 40), begin + len(answer))


def check_all(rows: Sequence[RowText], tally: Tally) -> None:
    """What is wrong with an answer beside the others."""
    answered = [row for row in rows if row.answers]
    _empty(answered, tally)
    _json(answered, tally)
    _endings(answered, tally)
    padded = [row for row in answered if any(answer != answer.strip(" \t") for answer in row.answers)]
    if len(padded) < 0.5 * len(answered):
        for row in padded:
            tally.add(row, [Hit("answer_space")])


def _empty(rows: Sequence[RowText], tally: Tally) -> None:
    """An answer of "none" is sound where it is a class of the task."""
    by_answer: dict[str, list[RowText]] = {}
    for row in rows:
        for answer in row.answers:
            if len(answer) <= 40 and _EMPTY.fullmatch(answer.strip()):
                by_answer.setdefault(answer.strip(), []).append(row)
    for answer, hit in by_answer.items():
        is_word = answer.lower() in ("none", "unknown", "null", "无", "没有")
        if not is_word or len(hit) <= max(1, _MEANT_EMPTY * len(rows)):
            for row in hit:
                start = row.whole.rindex(answer)
                tally.add(row, [Hit("empty_answer", start, start + len(answer))])


def _json(rows: Sequence[RowText], tally: Tally) -> None:
    begun = [row for row in rows if row.answers[-1].lstrip()[:1] in ("{", "[")]
    broken = [row for row in begun if not _parses(row.answers[-1])]
    if len(begun) >= 5 and len(broken) <= 0.2 * len(begun):
        for row in broken:
            tally.add(row, [Hit("broken_json", max(0, len(row.whole) - 50), len(row.whole))])


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _endings(rows: Sequence[RowText], tally: Tally) -> None:
    """Where sentences end as sentences do, an answer of sentences that ends in the middle of one was cut."""
    long = [row for row in rows if len(row.answers[-1]) >= 80]
    open_ended = [row for row in long if not _DONE.search(row.answers[-1])]
    if len(long) < 5 or len(open_ended) > 0.2 * len(long):
        return
    for row in open_ended:
        answer = row.answers[-1].rstrip()
        line = answer.rsplit("\n", 1)[-1]
        # A heading, a list, a poem or a signature ends without a stop; a paragraph of several sentences does not.
        sentence = _LATIN_WORD_END.search(answer) and re.search(r"[.!?] +[A-ZÀ-Ý]", line)
        if sentence and (len(answer) >= _CUT_AT or _UNFINISHED.search(answer)) and len(_WORDS.findall(line)) >= 12:
            end = row.whole.rindex(answer) + len(answer)
            tally.add(row, [Hit("broken_off", max(0, end - 50), end)])
