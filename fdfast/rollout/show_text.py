"""Text of a model made fit for a terminal: nothing in it is obeyed, all of it is seen."""

import re
import unicodedata

# Cc: escapes, bells, carriage returns. Cf: what turns the direction of text, or hides. Zl, Zp: ends
# of lines to some. Left alone: newline, tab, and the joiners within emoji and scripts.
_UNSEEN = re.compile(
    "[^\n\t -~\u200c\u200d]"  # plain ASCII is passed over in one step
)
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def harmless(text: str) -> str:
    """The text with control and invisible characters spelled out: ESC as U+241B (its picture),
    others as <U+202E>. Newlines and tabs stay.
    """
    return _UNSEEN.sub(_spelled, text)


def _spelled(found: re.Match[str]) -> str:
    character = found[0]
    code = ord(character)
    if unicodedata.category(character) not in _HIDDEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def cut(text: str, *, lines: int, chars: int = 2000) -> str:
    """The beginning of a text, with a note of what was cut; without newlines at its end.

    Args:
        text: any.
        lines: that are kept.
        chars: that are kept of them, over all.
    """
    text = text.rstrip("\n")
    kept = "\n".join(text.split("\n")[:lines])[:chars]
    rest = text[len(kept) :]
    if not rest:
        return text
    if rest[0] == "\n":
        left = rest.count("\n")
        what = f"{left} more line{'s' if left > 1 else ''}"
    else:
        what = f"{len(rest)} more characters"
    return f"{kept}\n... {what} (--full shows all)"
