"""A theorem of the set before it is numbered."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Draft:
    """A theorem without a name: what stands between the name and `:=`, its proof, its words."""

    signature: str
    proof: str
    words: str


def list_words(words: list[str]) -> str:
    """Say a list: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
