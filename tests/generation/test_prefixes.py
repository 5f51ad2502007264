"""Kept prompts against a plain model of them: what is found is right, and what was used least lately goes first."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.generation.prefixes import WORTH_SHARING, Prefixes, common
from peftkit.generation.rows import Kept

BYTES = 8  # of one token: one layer, keys and values, a float each
SHORT = st.lists(st.integers(0, 1), max_size=6).map(tuple)
TOKENS = st.builds(lambda head, tail: (7,) * head + tail, st.sampled_from([0, 15, 16, 17, 20]), SHORT)
STEPS = st.lists(st.tuples(st.sampled_from(["keep", "longest"]), st.sampled_from("ab"), TOKENS), max_size=25)


def kept(digest: str, tokens: tuple[int, ...]) -> Kept:
    """Keys that say whose they are, and of which tokens."""
    keys = torch.tensor([ord(digest) * 100 + token for token in tokens], dtype=torch.float32).view(1, -1, 1)
    return [(keys, keys.clone())]


@settings(max_examples=150, deadline=None)
@given(STEPS, st.integers(0, 80))
def test_what_is_found_belongs_to_the_digest_and_to_the_tokens(
    steps: list[tuple[str, str, tuple[int, ...]]], room: int
) -> None:
    prefixes = Prefixes(room * BYTES)
    held: list[tuple[str, tuple[int, ...]]] = []  # least recently used first
    for what, digest, tokens in steps:
        if what == "keep":
            prefixes.keep(digest, tokens, kept(digest, tokens))
            if WORTH_SHARING <= len(tokens) <= room:
                held = [e for e in held if not (e[0] == digest and e[1] == tokens[: len(e[1])])] + [(digest, tokens)]
                while sum(len(entry[1]) for entry in held) > room:
                    held.pop(0)
        else:
            found = prefixes.longest(digest, tokens)
            lengths = [common(e[1], tokens[:-1]) if e[0] == digest else 0 for e in held]
            best = max(lengths, default=0)
            assert (found is None) == (best < WORTH_SHARING)
            if found is not None:
                assert found[1] == best
                assert torch.equal(found[0][0][0][:, :best], kept(digest, tokens[:best])[0][0])
                used = held.pop(lengths.index(best))
                held.append(used)
        assert prefixes.bytes == sum(len(tokens) for _, tokens in held) * BYTES <= room * BYTES
        for name in "ab":
            for _, stored in held:
                assert prefixes.has(name, stored) == any(d == name and t[: len(stored)] == stored for d, t in held)


@given(SHORT, SHORT)
def test_common_is_the_number_of_equal_leading_tokens(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    shared = common(one, other)
    assert one[:shared] == other[:shared]
    assert shared == min(len(one), len(other)) or one[shared] != other[shared]
