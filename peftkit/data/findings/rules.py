"""The table of everything that the audit looks for.

`says` is filled with {rows} ("1 row", "12 rows"), {share} and {detail}; `mend` is a command or an edit. An error stops
the run, unless `data.accept` names it; a warning is told; a note stands in the report only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
Of = Literal["rows", "held-out rows", "training rows", "sample"]


@dataclass(frozen=True)
class Rule:
    """One thing to look for."""

    id: str
    severity: Severity
    says: str
    mend: str
    error_from: float | None = None
    """Share of rows from which a warning is an error: beyond it the run would certainly be wrong."""
    of: Of = "rows"
    """What its share is a share of."""
    final: bool = False
    """The rows cannot become tokens as they are, so `data.accept` does not help."""


_DROP = "remove these rows, or edit them"

_ALL = (
    # Lengths: what the limit takes away.
    Rule("too_long", "error", "{rows} longer than {detail}",
         "set data.max_length higher, or choose data.too_long=drop or data.too_long=truncate", final=True),
    Rule("cut", "warning", "{rows} cut to {detail}: the end of the answer is lost, the end-of-turn token with it",
         "set data.max_length higher"),
    Rule("left_out", "warning", "{rows} left out: {detail}", "set data.max_length higher"),
    Rule("nothing_to_learn", "error", "no {detail} is left to use",
         "set data.max_length higher, or add rows with answers", final=True),
    Rule("little_to_learn", "warning", "the loss falls on {detail} of all tokens; prompts are most of the work",
         "shorten what every prompt repeats, or check that answers and prompts are not exchanged"),
    Rule("length_outlier", "note", "{rows} more than ten times as long as the middle row ({detail})",
         "look whether several rows were joined; the longest row decides how much memory a run needs"),
    # Labels and template: what is learned is what inference needs.
    Rule("unreadable", "error", "{rows} that cannot be learnt from whole", "edit or remove these rows", final=True),
    Rule("unusable", "error", "{rows} that cannot be rendered", "edit or remove these rows", final=True),
    Rule("no_stop", "error", "no answer in {detail} ends with a learned end-of-turn token: the model would never stop",
         "set data.max_length higher, so that answers keep their end"),
    Rule("stop_added", "warning", "the template ends no turn, so the end-of-sequence token was added to {rows}",
         "nothing, if that token ends answers where you serve; else use a template that ends its turns"),
    Rule("stop_twice", "warning", "an end-of-turn token in the middle of {rows} of plain text",
         "store conversations as messages, so that only answers are learned"),
    Rule("double_bos", "error", "{rows} with two beginning-of-sequence tokens",
         "remove the token from the text: the tokenizer writes its own"),
    Rule("pad_is_stop", "note",
         "the padding token is the end-of-turn token ({detail}); harmless here, as the loss mask "
         "is made from the rows and not from the padding token", ""),
    Rule("foreign_template", "warning", "control text of another chat template in {rows}",
         "store conversations as messages without markers: the base's own template writes them", error_from=0.5),
    Rule("role_label", "warning", "{rows} whose answer begins with a speaker's name",
         "remove the label: the template says who speaks"),
    Rule("first_turn_assistant", "warning", "{rows} beginning with an answer to nothing",
         "remove the first answer, or put the question before it"),
    Rule("system_mixed", "note", "{rows} without a system message, while others have one",
         "give all rows the system message that will be used when serving, or none"),
    Rule("tools_missing", "warning", "{rows} with calls of tools that no `tools` column describes",
         "add the column `tools` with the schemas, as they will be sent when serving"),
    Rule("think_open", "warning", "{rows} with a <think> block that is not closed",
         "close it, or set data.think=strip after mending the row"),
    Rule("think_mixed", "warning", "{rows} with a <think> block in the answer, while others have none",
         "set data.think=strip, or keep two kinds of rows apart"),
    Rule("placeholder", "warning", "unfilled placeholders in {rows}",
         "fill them in: {{name}} would be learned as it stands"),
    Rule("unused_columns", "note", "columns that nothing reads: {detail}",
         "nothing, if they are not part of the question; else rename them to a column of the format"),
    # Duplicates, leakage, contamination.
    Rule("duplicate", "warning", "{rows} repeating an earlier row word for word",
         "remove them: a row that stands twice is learned twice"),
    Rule("near_duplicate", "warning", "{rows} nearly like an earlier row",
         "keep one of each, unless the difference is what should be learned"),
    Rule("conflict", "warning", "{rows} with another answer to a question of an earlier row",
         "decide for one answer, or say in the prompt what makes the difference"),
    Rule("leak", "warning", "{rows} ({share}) found in the training rows word for word, answer included",
         "remove them from one side: a memorised row measures nothing", error_from=0.05, of="held-out rows"),
    Rule("leak_prompt", "warning", "{rows} ({share}) with the question of a training row",
         "remove them from one side, unless the question is always the same", of="held-out rows"),
    Rule("leak_near", "warning", "{rows} ({share}) close to training rows, so their figures flatter the adapter",
         "remove them from one side", of="held-out rows"),
    Rule("contaminated", "warning", "{rows} holding rows of {detail}",
         "remove them: a benchmark that was learned measures nothing", of="training rows"),
    # Private.
    Rule("private_key", "error", "private keys in {rows}",
         "remove the key, and replace it where it is used: an adapter can recite it"),
    Rule("secret", "warning", "access tokens or keys in {rows}",
         "remove them, and revoke those that are real: an adapter can recite them"),
    Rule("password", "warning", "passwords in {rows}", "replace them by a placeholder"),
    Rule("email", "warning", "e-mail addresses in {rows}", "replace them by addresses under example.com"),
    Rule("phone", "warning", "telephone numbers in {rows}", "replace them by made-up numbers"),
    Rule("bank_account", "warning", "bank accounts (IBAN) in {rows}", "replace them by a placeholder"),
    Rule("credit_card", "warning", "credit card numbers in {rows}", "replace them by a placeholder"),
    Rule("national_id", "warning", "national identity numbers in {rows}", "replace them by a placeholder"),
    Rule("ip_address", "note", "public IP addresses in {rows}", "replace them by 192.0.2.1 (RFC 5737)"),
    # Text quality.
    Rule("mojibake", "warning", "text in the wrong encoding in {rows}",
         "read the source as UTF-8, or run it through ftfy"),
    Rule("replacement_char", "warning", "characters lost in conversion (U+FFFD) in {rows}", "read the source again"),
    Rule("control_char", "warning", "control characters in {rows}", "remove them"),
    Rule("invisible_char", "warning", "invisible characters in {rows}", "remove them: they change the tokens, unseen"),
    Rule("bidi_control", "warning", "characters that turn the direction of writing in {rows}",
         "remove them: what is read is not what is learned"),
    Rule("private_use", "warning", "characters without a meaning (private use) in {rows}",
         "replace them: they come from the fonts of a PDF"),
    Rule("html", "warning", "remains of HTML in {rows}", "convert the source to text"),
    Rule("escaped", "warning", "escape sequences written out in {rows}",
         "decode the text once more: it was escaped twice"),
    Rule("unbroken", "warning", "strings of more than 200 characters without a space in {rows}",
         "remove encoded files and the like"),
    Rule("repetitive", "warning", "extremely repetitive text in {rows}", _DROP),
    # Answers.
    Rule("empty_answer", "warning", "{rows} whose answer says nothing (N/A, TODO, …)", _DROP, error_from=0.5),
    Rule("refusal", "warning", "{rows} whose answer is a model's refusal", _DROP),
    Rule("echo", "warning", "{rows} whose answer is the prompt", "check which column is the answer", error_from=0.5),
    Rule("prompt_in_answer", "warning", "{rows} whose answer begins with the whole prompt",
         "remove the prompt from the answer"),
    Rule("open_fence", "warning", "{rows} whose answer ends inside a code block",
         "close the block, or complete the answer"),
    Rule("broken_json", "warning", "{rows} whose answer is broken JSON while the others' is sound", _DROP),
    Rule("broken_off", "warning", "{rows} whose answer breaks off in a sentence",
         "complete the answer: endings are learned"),
    Rule("answer_space", "warning", "{rows} whose answer has spaces around it while most have none",
         "strip them: a space before the answer is another first token"),
    # Classes.
    Rule("one_answer", "warning", "all rows have the same answer ({detail})", "add rows of the other classes"),
    Rule("imbalance", "warning", "{share} of the rows have the answer {detail}",
         "read figures against a guess of that class; balance the rows if the rare classes matter"),
    Rule("label_variant", "warning", "{rows} with another spelling of a label than most",
         "spell each label in one way"),
    Rule("label_rare", "note", "{rows} with a label that stands at most twice",
         "check for mistakes, or add rows of that class"),
    Rule("label_unseen", "warning", "{rows} with a label that no training row has",
         "add such rows to training: the adapter cannot know the label", of="held-out rows"),
    # Languages.
    Rule("answer_language", "note", "{rows} answered in another language than asked",
         "nothing, if translation is meant",
         of="sample"),
    Rule("language_mix", "note", "{rows} in another language than most ({detail})",
         "remove them, if one language is meant",
         of="sample"),
)  # fmt: skip

RULES: dict[str, Rule] = {rule.id: rule for rule in _ALL}


def check_accepted(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names. Raises ValueError for one that is no rule, and for a rule that stops every run."""
    for name in names:
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(RULES)}"
            raise ValueError(f"the audit has no rule {name!r}{meant}")
        if RULES[name].final:
            raise ValueError(f"{name!r} cannot be accepted: {RULES[name].mend}")
    return names
