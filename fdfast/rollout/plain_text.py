"""Encoding what others wrote, tools, Lean, a model, as text that can't pass for special tokens."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int]


class PlainText:
    """Encodes text of a chat template around texts of others.

    Where these hold the text of an added token, such as <|im_end|> or </tool_response>, it is
    encoded in pieces that are none, so they can neither end their own message nor begin another.
    All else is encoded as the tokenizer encodes the whole text.

    Args:
        tokenizer: any of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        # Runs of blanks, added by some tokenizers to save tokens, are no marks.
        added = (t.content for t in tokenizer.added_tokens_decoder.values())
        marks = [mark for mark in added if len(mark) > 1 and mark.strip()]
        # A look-ahead, so that those that overlap are found, too.
        longest_first = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
        self._marks = re.compile(f"(?=({longest_first}))" if marks else r"(?!)")

    def encode(self, text: str, spans: Sequence[Span]) -> list[int]:
        """The ids of a text.

        Args:
            text: all of it.
            spans: start and end of each part that others wrote.
        """
        cuts = [0]
        for found in self._marks.finditer(text):
            start, end = found.span(1)
            # Cut after its first character, each mark that they have a part in is none.
            if any(start < stop and begin < end for begin, stop in spans):
                cuts.append(start + 1)
        pieces = [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]
        encoded = self.tokenizer(pieces, add_special_tokens=False).input_ids
        return list(itertools.chain.from_iterable(encoded))

    def encode_chat(self, text: str, others: Iterable[str]) -> list[int]:
        """The ids of a rendered conversation.

        Args:
            text: as the template wrote it.
            others: what others wrote; wherever the template put it, its ends trimmed at most.
        """
        spans: list[Span] = []
        for other in others:
            trimmed = other.strip()
            if trimmed and self._marks.search(trimmed):
                spans += [m.span() for m in re.finditer(re.escape(trimmed), text)]
        return self.encode(text, spans)
