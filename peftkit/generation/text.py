"""The text of one answer while its tokens arrive: characters are given once they are certain, stop strings cut it."""

from __future__ import annotations

from peftkit.base.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # how tokenizers decode bytes that are not, or not yet, a character
# Two characters of four bytes, a token for each: any longer wait for a character means bytes that are none.
_LONGEST_WAIT = 8


class Text:
    """Incremental decoding of an answer's tokens, cut before the first stop string.

    What `add` and `finish` return makes up `tokenizer.decode` of all tokens, up to the first stop string. A token
    costs the decoding of a few tokens, whatever the length of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        """Whether a stop string is complete; nothing of it, and nothing after it, is in the text."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._pieces: list[str] = []
        # A decoder may treat the first tokens it sees in its own way (SentencePiece drops their space), so every
        # decoding begins with `_known` tokens whose characters are out already.
        self._window: list[int] = []
        self._known = 0
        self._given = 0  # characters of the window that have left it
        self._held = ""  # decoded, and perhaps the beginning of a stop string

    @property
    def text(self) -> str:
        """All that has been given out."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """The characters that became certain with `token`; none after a stop string."""
        if self.stopped:
            return ""
        self._window.append(token)
        decoded = self._decode(self._window)
        fresh = self._take(decoded.rstrip(_PARTIAL))
        if decoded.endswith(_PARTIAL):
            if len(self._window) - self._known > _LONGEST_WAIT:
                fresh += self._give_up_waiting(decoded)
        elif fresh:
            self._move()
        # A space alone is nothing to SentencePiece, two are one; control tokens and unknown ids are never anything.
        elif not self._decode([token, token]):
            self._window.pop()
        return self._emit(fresh, last=False)

    def finish(self) -> str:
        """What was held back and is text after all, now that no token follows."""
        if self.stopped:
            return ""
        return self._emit(self._take(self._decode(self._window)), last=True)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def _take(self, certain: str) -> str:
        fresh = certain[self._given :]
        self._given += len(fresh)
        return fresh

    def _move(self) -> None:
        """Keep the newest tokens, whose characters are all out, as the beginning of the next window."""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._given = len(self._decode(self._window))

    def _give_up_waiting(self, decoded: str) -> str:
        """Cut the window where no character spans the cut, so that bytes that are no text cannot make it grow."""
        for cut in range(len(self._window) - 1, max(self._known, len(self._window) - 4) - 1, -1):
            begin, rest = self._decode(self._window[:cut]), self._window[cut:]
            if begin + self._decode(rest) == decoded:
                fresh = self._take(begin)
                self._window, self._known, self._given = rest, 0, 0
                return fresh
        return ""

    def _emit(self, fresh: str, *, last: bool) -> str:
        self._held += fresh
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - (0 if last else self._open())
        piece, self._held = self._held[:end], "" if found else self._held[end:]
        if piece:
            self._pieces.append(piece)
        return piece

    def _open(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stop), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
