"""Trajectories on a terminal: who asked what, what the model wrote turn by turn, what its tools
answered, what the teacher was told, and what it makes of each token.

Text of models, tools and files is never read as markup, and its control characters are spelled out.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.box import ROUNDED, SIMPLE_HEAD
from rich.console import RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from fdfast.lean.verdict import Message, Verdict
from fdfast.rollout.records import Record
from fdfast.rollout.show_ratios import (
    LIGHT,
    Palette,
    coloured,
    legend,
    summarise,
    summary_text,
)
from fdfast.rollout.show_text import cut, harmless
from fdfast.rollout.trajectory import ToolCall, Trajectory

VERDICT_COLOURS = {
    "proved": "green",
    "failed": "red",
    "timeout": "yellow",
    "crashed": "magenta",
    "rejected": "yellow",
}
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the token limit",
    "tool_limit": "ended: no tool calls were left",
}
_LEAN = re.compile(r"\s*(?:/--|import |open |theorem |lemma |example |def )")
_NO_TEACHER = "no teacher log-probabilities: `fdfast rollout` without --no-feedback gets them"


@dataclass(frozen=True)
class ShowOptions:
    """How records are shown.

    Attributes:
        palette: of log-ratios; None: without any colour.
        scale: the log-ratio at which a colour is strongest, nats.
        full: nothing is cut, and the prompt is shown.
    """

    palette: Palette | None = None
    scale: float = 2.0
    full: bool = False


def record_view(record: Record, index: int, options: ShowOptions) -> Iterator[RenderableType]:
    """What a rich console prints of a record, from top to bottom.

    Args:
        record: the record.
        index: its place in the file, from 0.
        options: how.
    """
    trajectory = record.trajectory
    yield _header(record, index)
    yield Padding(_facts(record), (0, 0, 0, 2))
    if trajectory.verdict is not None:
        yield from _messages(trajectory.verdict.messages, options)
    yield Text()
    if options.full and record.prompt:
        yield _heading("prompt")
        yield _indented(record.prompt, style="dim")
    yield _heading("statement")
    yield _code_or_text(record.statement, options, lean=bool(_LEAN.match(record.statement)))
    summary = summarise(record)
    if summary is not None:
        yield Text()
        yield Padding(legend(options.palette, options.scale), (0, 0, 0, 2))
    yield from _turns(record, options)
    if summary is not None:
        yield Padding(summary_text(summary, options.palette, options.scale), (1, 0, 0, 2))
    elif record.teacher_logprobs is None:
        yield Padding(Text(_NO_TEACHER, "dim", overflow="fold"), (1, 0, 0, 2))
    else:
        yield Padding(Text("no student log-probabilities", "dim"), (1, 0, 0, 2))
    if trajectory.verdict is not None and _says_more(trajectory, options):
        yield Text()
        yield _heading("proof, as Lean was asked to check it")
        yield _code_or_text(trajectory.proof, options, lean=True, numbers=True)
    if record.feedback is not None:
        yield Text()
        told = Text(harmless(record.feedback) or "(empty)", overflow="fold", tab_size=4)
        title = Text("feedback, which the teacher has read")
        panel = Panel(told, title=title, title_align="left", border_style="blue", box=ROUNDED)
        yield Padding(panel, (0, 0, 0, 2))
    yield Text()


def _says_more(trajectory: Trajectory, options: ShowOptions) -> bool:
    """Whether the proof is not what the last turn shows already."""
    return bool(trajectory.proof) and (
        options.full or trajectory.proof.strip() != trajectory.text.strip()
    )


def _header(record: Record, index: int) -> Rule:
    title = Text.assemble((f"{index}  ", "dim"), (_one_line(record.problem), "bold"), "  ")
    return Rule(title.append_text(_verdict(record.trajectory.verdict)), align="left", style="dim")


def _verdict(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("not checked", "dim")
    text = Text(verdict.kind, f"bold {VERDICT_COLOURS[verdict.kind]}")
    if verdict.kind == "proved":
        text.append(f" at level {verdict.level}", "dim")
    return text


def _facts(record: Record) -> Text:
    """Why it ended, how long it is, where it comes from."""
    trajectory = record.trajectory
    written = trajectory.num_sampled
    facts = [_ENDS[trajectory.end], f"{written} token{'s' if written != 1 else ''} written"]
    if told := len(trajectory.ids) - written:
        facts[-1] += f" of {written + told}"
    if trajectory.tool_calls:
        calls = len(trajectory.tool_calls)
        waited = f"{trajectory.waited_s:.2f} s waited for tools"
        facts.append(f"{calls} call{'s' if calls != 1 else ''}, {waited}")
    origin = [_one_line(record.model)] if record.model else []
    origin += [] if record.step is None else [f"step {record.step}"]
    origin += [f"seed {record.seed}"] + ["evaluation"] * record.evaluation
    lines = [Text(" \u00b7 ".join(words), "dim") for words in (facts, origin)]
    verdict = trajectory.verdict
    # Of `failed` the reason is an error with its place, in one line: it follows as a message.
    if verdict is not None and not any(
        " ".join(message.text.split())[:60] in verdict.reason for message in verdict.messages
    ):
        lines.insert(0, Text(_one_line(verdict.reason), VERDICT_COLOURS[verdict.kind]))
    return Text("\n", overflow="fold").join(line for line in lines if line)


def _messages(messages: Sequence[Message], options: ShowOptions) -> Iterator[RenderableType]:
    """Lean's first three, errors before others and of others a line; all with `full`."""
    colours = {"error": "red", "warning": "yellow"}
    shown: Sequence[Message] = messages
    if not options.full:
        shown = sorted(messages, key=lambda message: message.severity != "error")[:3]
    for message in shown:
        said = message.text.strip("\n")
        if not options.full and message.severity == "error":
            said = cut(said, lines=6)
        elif not options.full and "\n" in said:
            said = f"{said.partition(chr(10))[0]} ..."
        text = Text(overflow="fold", tab_size=4)
        text.append(f"{message.line}:{message.column} ", "dim")
        text.append(harmless(message.severity), colours.get(message.severity, "blue"))
        text.append(" ").append(harmless(said).replace("\n", "\n  "))
        yield Padding(text, (0, 0, 0, 4))
    if left := len(messages) - len(shown):
        note = f"... {left} more message{'s' if left > 1 else ''} (--full shows all)"
        yield Padding(Text(note, "dim"), (0, 0, 0, 4))


def _turns(record: Record, options: ShowOptions) -> Iterator[RenderableType]:
    """What the model wrote, and after each turn the calls that it ended in."""
    trajectory, ratios = record.trajectory, record.log_ratios
    calls: dict[int, list[ToolCall]] = {}
    for call in trajectory.tool_calls:
        calls.setdefault(call.position, []).append(call)
    answered = set(calls)
    number = end = 0
    for wrote, run in groupby(trajectory.wrote):
        begin, end = end, end + len(list(run))
        tokens = record.tokens[begin:end]
        if not wrote:
            # Shown as the calls' outputs; text that no call accounts for is not passed over.
            if begin not in answered:
                yield Text()
                yield _heading(f"read, not written ({end - begin} tokens)")
                yield _indented("".join(tokens), style="dim")
            continue
        number += 1
        yield Text()
        yield _heading(f"turn {number}", f"{end - begin} token{'s' if end - begin != 1 else ''}")
        some = None if ratios is None else ratios[begin:end]
        text = coloured(tokens, some, options.palette, options.scale)
        text.rstrip()
        yield Padding(text, (0, 0, 0, 2))
        for call in calls.pop(end, []):
            yield from _call(call, options)
    if not number:
        yield Padding(Text("the model wrote nothing", "dim"), (1, 0, 0, 2))


def _call(call: ToolCall, options: ShowOptions) -> Iterator[RenderableType]:
    """A call: name, arguments, whether it went well, and the answer."""
    text = Text(overflow="fold")
    text.append("\u2192 ", "bold cyan").append(
        _one_line(call.name) or "(no call that can be read)", "bold cyan"
    )
    text.append("  ")
    text.append("ok" if call.ok else "failed", "green" if call.ok else "bold red")
    text.append(f"  {call.seconds:.2f} s", "dim")
    yield Padding(text, (1, 0, 0, 2))
    arguments = _arguments(call.arguments)
    if arguments is None:
        yield _indented(call.arguments, by=6, options=options)
    else:
        code = arguments.get("content")
        for name, value in arguments.items():
            if name == "content" and isinstance(code, str):
                continue
            said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            said = said if options.full else cut(said, lines=12)
            line = Text(overflow="fold", tab_size=4).append(f"{_one_line(name)}: ", "cyan")
            yield Padding(line.append(harmless(said)), (0, 0, 0, 6))
        if isinstance(code, str):
            yield _code_or_text(code, options, lean=True, by=6, numbers=True)
    yield _indented(call.output, by=6, style="dim", options=options, first="\u2190 ")


def _arguments(written: str) -> dict[str, Any] | None:
    """None where they are no JSON object."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _heading(title: str, more: str = "") -> Text:
    return Text.assemble((title, "bold blue"), (f"  {more}" if more else "", "dim"))


def _one_line(text: str) -> str:
    return harmless(text).replace("\n", "\u21b5").replace("\t", " ")


def _indented(
    text: str,
    *,
    by: int = 2,
    style: str = "",
    options: ShowOptions | None = None,
    first: str = "",
) -> Padding:
    """Text of somebody else; cut where `options` are given and say so."""
    if options is not None and not options.full:
        text = cut(text, lines=12)
    shown = harmless(text.strip("\n")).replace("\n", f"\n{' ' * len(first)}")
    return Padding(Text(first + shown, style, overflow="fold", tab_size=4), (0, 0, 0, by))


def _code_or_text(
    text: str, options: ShowOptions, *, lean: bool, by: int = 2, numbers: bool = False
) -> Padding:
    shown = harmless(text if options.full else cut(text, lines=40, chars=8000)).strip("\n")
    if not lean or options.palette is None:
        lines = shown.split("\n")
        if numbers:
            width = len(str(len(lines)))
            lines = [f"{number:>{width}} \u2502 {line}" for number, line in enumerate(lines, 1)]
        return Padding(Text("\n".join(lines), overflow="fold", tab_size=4), (0, 0, 0, by))
    code = Syntax(
        shown,
        "lean4",
        theme="ansi_light" if options.palette is LIGHT else "ansi_dark",
        background_color="default",
        line_numbers=numbers,
        word_wrap=True,
        tab_size=4,
    )
    return Padding(code, (0, 0, 0, by))


def record_table() -> Table:
    """An empty table of records; `record_row` gives its rows."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("index", justify="right", style="dim")
    table.add_column("problem", overflow="fold")
    for name in ("verdict", "end"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "tokens", "calls", "mean log-ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def record_row(record: Record, index: int) -> list[Text]:
    """A record in a line."""
    trajectory, summary = record.trajectory, summarise(record)
    ratio = Text("-", "dim")
    if summary is not None:
        ratio = Text(f"{summary.mean:+.3f}", "green" if summary.mean > 0 else "red")
    verdict = trajectory.verdict
    kind = (
        Text("-", "dim") if verdict is None else Text(verdict.kind, VERDICT_COLOURS[verdict.kind])
    )
    step = "-" if record.step is None else f"{record.step}{' eval' if record.evaluation else ''}"
    return [
        Text(str(index)),
        Text(_one_line(record.problem)),
        kind,
        Text(trajectory.end),
        Text(step),
        Text(str(trajectory.num_sampled)),
        Text(str(len(trajectory.tool_calls))),
        ratio,
    ]
