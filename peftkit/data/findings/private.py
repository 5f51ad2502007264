"""Secrets and personal data: what an adapter could recite. A hit is a span; `masked` hides every one of them.

Tokens are found by the patterns of detect-secrets (Yelp) and a few of issuers that came later; numbers count only when
their check digits hold (python-stdnum) or their numbering plan has them (phonenumbers).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module

from peftkit.data.findings.finding import Hit, RowText

Spans = Iterator[tuple[str, int, int, str]]

_DIGITS = frozenset("0123456789")
# Anything that a pattern below can match holds one of these; looking for them first is twenty times as fast.
_TRIGGER = re.compile(
    r"PRIVATE KEY|PuTTY-User|A3T[A-Z0-9]|ABIA|ACCA|AKIA|ASIA|aws|AWS|gh[pousr]_|github_pat_|gl[a-z]{2,5}-|GR1348941|xox"
    r"|hooks\.slack|[rs]k_(?:live|test)_|T3BlbkFJ|eyJ|SG\.|_authToken|pypi-A|AccountKey=|sq0csp-|://|AC[a-z0-9]{32}"
    r"|SK[a-z0-9]{32}|:[0-9A-Za-z_-]{35}|-us\d|AIza|hf_|sk-|AKC[a-zA-Z0-9]{10}"
)
_PLUGINS = {
    "artifactory": "ArtifactoryDetector", "aws": "AWSKeyDetector", "azure_storage_key": "AzureStorageKeyDetector",
    "github_token": "GitHubTokenDetector", "gitlab_token": "GitLabTokenDetector", "jwt": "JwtTokenDetector",
    "mailchimp": "MailchimpDetector", "npm": "NpmDetector", "openai": "OpenAIDetector",
    "pypi_token": "PypiTokenDetector", "sendgrid": "SendGridDetector", "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector", "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector", "twilio": "TwilioKeyDetector",
}  # fmt: skip
# Issuers that detect-secrets 1.5 does not know, from their own documentation.
_LATER = (
    ("GitHub Token", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{60,}")),
    ("Google API Key", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("Hugging Face Token", re.compile(r"\bhf_[A-Za-z]{30,}\b")),
    ("Anthropic or OpenAI Key", re.compile(r"\bsk-(?:ant|proj)-[A-Za-z0-9_-]{32,}")),
)
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----\s+(?:[\w-]+: .*\s+)*[A-Za-z0-9+/=]{40}[A-Za-z0-9+/=\s]*"
    r"|PuTTY-User-Key-File-\d"
)
_URL_PASSWORD = re.compile(r"://[^\s/:@{}<>]+:([^\s/@{}<>$]{3,})@[\w-]")
_ASSIGNED = re.compile(
    r"\b(?:password|passwd|passphrase|pwd)\b\s*(?:is|:|=)\s*[\"']?([^\s\"'<>{}]{6,40})", re.IGNORECASE
)
_EMAIL = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+([A-Za-z]{2,24})\b")
# RFC 2606 and RFC 6761: names that belong to nobody.
_NOBODY = re.compile(r"@(?:[\w-]+\.)*(?:example(?:\.(?:com|org|net|edu))?|test|invalid|localhost)$", re.IGNORECASE)
_FILES = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "json", "py"))  # logo@2x.png is no address
# What any number below has; most texts with digits have no more than a year.
_LONG_NUMBER = re.compile(r"\d(?:[ .()/-]{0,2}\d){6}|[A-Z]{6}\d\d|(?:\d{1,3}\.){3}\d|[A-Z]{2}\d\d ?[A-Z0-9]{4}")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.,/-])\d(?:[ -]?\d){12,18}(?![\d.,/-]*\d)")
_IP = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_SAYS_IP = re.compile(
    r"(?:\b(?:ip|ipv4|address|host|server|ping|ssh|client|from)\b|@|://)(?!.*\bv(?:ersion)?\b)", re.IGNORECASE
)
_PHONE = re.compile(r"(?<![\w.])(?:\+\d|\(\d{3}\) ?\d{3}|\d{3}[-.]\d{3}[-.]\d{4}(?!\d))")
_NATIONAL = (
    (re.compile(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"), "us.ssn"),
    (re.compile(r"(?<!\d)\d{3}\.\d{3}\.\d{3}-\d{2}(?!\d)"), "br.cpf"),
    (re.compile(r"(?<!\w)\d{17}[\dX](?!\w)"), "cn.ric"),
    (re.compile(r"\b[A-Z]{6}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z]\b"), "it.codicefiscale"),
    (re.compile(r"(?<!\d)756\.\d{4}\.\d{4}\.\d{2}(?!\d)"), "ch.ssn"),
    (re.compile(r"(?<!\d)[12] ?\d{2} ?\d{2} ?\d{2} ?\d{3} ?\d{3} ?\d{2}(?!\d)"), "fr.nir"),
    (re.compile(r"(?<![\w-])\d{8}-?[A-HJ-NP-TV-Z](?![\w-])"), "es.dni"),
)
# A word that is no password: "password is incorrect", "password: required".
_NO_PASSWORD = re.compile(r"^(?:[a-z]+[.,;:!?)]*|[A-Z][a-z]+[.,;:!?)]*|[*x•.]+|.*[(\[].*)$")


def check(row: RowText) -> Iterator[Hit]:
    """Secrets and personal data of one row."""
    for rule, start, end, kind in spans(row.whole, row.chars):
        yield Hit(rule, start, end, kind)


def spans(text: str, chars: frozenset[str]) -> Spans:
    """Where private things stand, with the rule that each breaks and the kind of a key."""
    if _TRIGGER.search(text):
        yield from _secrets(text)
    if "assw" in text or "asswor" in text.lower() or "pwd" in text.lower():
        for found in _ASSIGNED.finditer(text):
            if not _NO_PASSWORD.match(found[1]):
                yield "password", *found.span(1), ""
    if "@" in chars:
        for found in _EMAIL.finditer(text):
            if found[1].lower() not in _FILES and not _NOBODY.search(found[0]):
                yield "email", *found.span(), ""
    if chars & _DIGITS:
        yield from _numbers(text)


def masked(text: str) -> str:
    """The text with every private span replaced by dots of the same length."""
    shown = list(text)
    for _, start, end, _ in spans(text, frozenset(text)):
        shown[start:end] = "•" * (end - start)
    return "".join(shown)


def _secrets(text: str) -> Spans:
    for found in _KEY.finditer(text):
        yield "private_key", *found.span(), "Private Key"
    for kind, pattern in _tokens():
        for found in pattern.finditer(text):
            if _is_random(found[0]):
                yield "secret", *found.span(), kind
    for found in _URL_PASSWORD.finditer(text):
        if found[1].lower() not in ("password", "pass", "pwd", "token", "secret", "***", "xxx"):
            yield "password", *found.span(1), ""


@lru_cache
def _tokens() -> tuple[tuple[str, re.Pattern[str]], ...]:
    plugins = [getattr(import_module(f"detect_secrets.plugins.{name}"), kind) for name, kind in _PLUGINS.items()]
    return (*((plugin.secret_type, pattern) for plugin in plugins for pattern in plugin.denylist), *_LATER)


def _is_random(token: str) -> bool:
    """Whether a token can be a real one: documentation writes xxxx, 0000 or YOUR_KEY_HERE."""
    return len(set(token)) >= 10 and not re.search(r"x{6}|X{6}|0{8}|\*{3}|your|example", token, re.IGNORECASE)


def _numbers(text: str) -> Spans:
    if not _LONG_NUMBER.search(text):
        return
    for found in _IBAN.finditer(text):
        if _valid("iban", found[0]):
            yield "bank_account", *found.span(), ""
    for found in _CARD.finditer(text):
        # The first digits name the network; a valid Luhn digit alone is one number in ten.
        digits = re.sub(r"[ -]", "", found[0])
        known = re.match(r"4|5[1-5]|2[2-7]|3[47]|6(?:011|4[4-9]|5)", digits)
        if known and len(digits) in (15, 16) and len(set(digits)) > 3 and _valid("luhn", digits):
            yield "credit_card", *found.span(), ""
    for pattern, module in _NATIONAL:
        for found in pattern.finditer(text):
            if _valid(module, found[0]):
                yield "national_id", *found.span(), module.replace(".", " ")
    if _PHONE.search(text):
        yield from _phones(text)
    for found in _IP.finditer(text):
        if _SAYS_IP.search(text[max(0, found.start() - 30) : found.start()]) and _is_public(found[0]):
            yield "ip_address", *found.span(), ""


def _valid(module: str, number: str) -> bool:
    return bool(_validator(module)(number))


@lru_cache
def _validator(module: str) -> Callable[[str], bool]:
    valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return valid


def _phones(text: str) -> Spans:
    import phonenumbers

    for found in phonenumbers.PhoneNumberMatcher(text, "US", phonenumbers.Leniency.VALID):
        # Without a country code only American ways of writing count; 555-01xx is kept for fiction.
        written = found.raw_string
        fiction = re.search(r"555\D?01\d\d$", written)
        if not fiction and (written.startswith("+") or _PHONE.match(written)):
            yield "phone", found.start, found.end, ""


def _is_public(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not text.endswith(".0") and text not in ("8.8.8.8", "8.8.4.4", "1.1.1.1")
