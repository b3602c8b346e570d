"""What the teacher makes of each token: colours as in figure 1 of arXiv 2605.30861, marks where
there are none, and a summary.

A log-ratio is the teacher's log-probability of a token less the student's, in nats: positive where
the feedback makes it likelier.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from fdfast.rollout.records import Record
from fdfast.rollout.show_text import harmless

RGB = tuple[int, int, int]

# Of the scale: where a token gets a colour, its newline is drawn, and it is marked without colour.
_FAINT, _SEEN, _STRONG = 0.05, 0.25, 0.5


@dataclass(frozen=True)
class Palette:
    """Backgrounds from the faintest to the strongest, and the colour of text on them."""

    text: RGB
    likelier: tuple[RGB, RGB]
    less_likely: tuple[RGB, RGB]

    def style(self, ratio: float, scale: float) -> Style:
        """Of a token.

        Args:
            ratio: its log-ratio, nats.
            scale: at which the colour is strongest, nats.
        """
        strength = min(1.0, abs(ratio) / scale)
        if strength < _FAINT:
            return Style()
        faint, strong = self.likelier if ratio > 0 else self.less_likely
        mixed = [round(a + (b - a) * strength) for a, b in zip(faint, strong, strict=True)]
        return Style(color=_rgb(self.text), bgcolor=_rgb(mixed))


def _rgb(colour: Sequence[int]) -> str:
    return "rgb({},{},{})".format(*colour)


DARK = Palette((240, 242, 244), ((24, 44, 32), (20, 132, 68)), ((54, 28, 30), (186, 40, 46)))
LIGHT = Palette((18, 22, 26), ((233, 246, 236), (84, 190, 118)), ((253, 236, 234), (238, 104, 96)))


def terminal_palette() -> Palette:
    """By $COLORFGBG, where the terminal says `FOREGROUND;BACKGROUND` in it; else a dark one."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return LIGHT if background in ("7", "9", "10", "11", "12", "13", "14", "15") else DARK


def coloured(
    tokens: Sequence[str], ratios: Sequence[float] | None, palette: Palette | None, scale: float
) -> Text:
    """Tokens with their log-ratios: as backgrounds, or without a palette as marks such as
    `[[simp|-1.8]]` (in the double brackets of U+27E6) at those that moved by half the scale.

    Args:
        tokens: their texts.
        ratios: as many, nats; None: plain.
        palette: None: no colours.
        scale: nats.
    """
    text = Text(overflow="fold", tab_size=4)
    if ratios is None:
        return text.append(harmless("".join(tokens)))
    for token, ratio in zip(tokens, ratios, strict=True):
        shown = harmless(token)
        strength = abs(ratio) / scale
        if palette is not None:
            if strength >= _SEEN:  # the background of a newline alone would not be seen
                shown = shown.replace("\n", "\u21b5\n")
            text.append(shown, palette.style(ratio, scale))
        elif strength < _STRONG or not shown:
            text.append(shown)
        else:
            text.append(_marked(shown, ratio))
    return text


def _marked(token: str, ratio: float) -> str:
    word = token.strip(" \n")
    if not word:
        word = token.replace("\n", "\u21b5").replace(" ", "\u2423")
        return f"\u27e6{word}|{ratio:+.1f}\u27e7" + "\n" * token.count("\n")
    before, after = token.split(word, 1)
    return f"{before}\u27e6{word}|{ratio:+.1f}\u27e7{after}"


def legend(palette: Palette | None, scale: float) -> Text:
    """One line that says what the colours, or the marks, mean."""
    if palette is None:
        least = _STRONG * scale
        where = f"where that is {least:g} nat{'s' if least != 1 else ''} or more"
        return Text(f"\u27e6token|x\u27e7: teacher's less student's log-prob, {where}")
    text = Text("teacher finds it  less likely ", overflow="fold")
    cells = 8
    text.append(f"-{scale:.1f} ")
    for cell in range(-cells, cells + 1):
        if cell == 0:
            text.append(" 0 ")
        else:
            text.append(" ", palette.style(scale * cell / cells, scale))
    return text.append(f" +{scale:.1f}").append(" likelier   (log-ratio, nats)")


@dataclass(frozen=True)
class Summary:
    """Of a record's log-ratios, over the tokens that the model wrote.

    Attributes:
        count: of tokens.
        mean: nats.
        mean_abs: of their absolute values, nats.
        likelier: the strongest tokens with their log-ratio, strongest first.
        less_likely: likewise downwards.
    """

    count: int
    mean: float
    mean_abs: float
    likelier: list[tuple[str, float]]
    less_likely: list[tuple[str, float]]


def summarise(record: Record, *, strongest: int = 3) -> Summary | None:
    """None where log-probabilities are not known, or the model wrote nothing."""
    ratios = record.log_ratios
    if ratios is None or not any(record.trajectory.wrote):
        return None
    triples = zip(record.tokens, ratios, record.trajectory.wrote, strict=True)
    moved = [(token, ratio) for token, ratio, wrote in triples if wrote]
    ranked = sorted(moved, key=lambda pair: pair[1])  # stable: of equals the first stands first
    return Summary(
        count=len(moved),
        mean=sum(ratio for _, ratio in moved) / len(moved),
        mean_abs=sum(abs(ratio) for _, ratio in moved) / len(moved),
        likelier=[pair for pair in sorted(moved, key=lambda p: -p[1])[:strongest] if pair[1] > 0],
        less_likely=[pair for pair in ranked[:strongest] if pair[1] < 0],
    )


def summary_text(summary: Summary, palette: Palette | None, scale: float) -> Text:
    """Three lines."""
    text = Text(overflow="fold")
    text.append("log-ratio   ", "bold")
    text.append(f"mean {summary.mean:+.3f}, mean |.| {summary.mean_abs:.3f} nats over ")
    text.append(f"{summary.count} token{'s' if summary.count != 1 else ''}")
    for name, pairs in (("likelier", summary.likelier), ("less likely", summary.less_likely)):
        text.append(f"\n{name:<12}", "bold")
        if not pairs:
            text.append("no token")
        for place, (token, ratio) in enumerate(pairs):
            shown = harmless(token).replace("\n", "\u21b5").replace("\t", "\u21e5")
            text.append("   " if place else "")
            text.append(f'"{shown}"', None if palette is None else palette.style(ratio, scale))
            text.append(f" {ratio:+.2f}")
    return text
