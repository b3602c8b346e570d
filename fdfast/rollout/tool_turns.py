"""Turns that end in tool calls: reading the calls, and writing the answers as the template does.

The answers' ids are what the chat template puts after the assistant's text; what the model wrote is
never rendered again.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from fdfast.errors import InputError
from fdfast.rollout.plain_text import PlainText
from fdfast.rollout.tool_calls import FORMS, Call, CallForm, Schemas, find_form, read_calls
from fdfast.rollout.trajectory import ToolCall

# Texts that no template changes, to find where an assistant's own begins and ends, and an output.
_MARK = "fdfast assistant turn"
_QUESTION = "fdfast question"
_OUTPUT = "fdfast tool output"
_PROBE = Call("fdfast_probe", '{"x": "fdfast value"}')
_PROBE_SCHEMA = {
    "type": "function",
    "function": {
        "name": _PROBE.name,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "A text."}},
            "required": ["x"],
        },
    },
}
_TORN = "\ufffd"
_THINK, _END_THINK = "<think>", "</think>"


class ToolTurns:
    """Reads calls and writes tools' answers for one tokenizer.

    What a tool says is plain text (`PlainText`): no output can end its own message or begin
    another's.

    Args:
        tokenizer: its chat template must know the role `tool`. Where it writes calls, they must
            have one of the forms in `FORMS`; where it has none, they are read as Hermes'.
        end_ids: tokens that end a turn.

    Raises:
        InputError: the template does not write a tool's answer, or calls in no known form.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._plain = PlainText(tokenizer)
        # After the last of these stands only what the template opens the model's turn with.
        self._headers = {
            id for id, t in added.items() if t.special and t.content not in (_THINK, _END_THINK)
        }
        self._ends = sorted({added[id].content for id in end_ids if id in added})
        self.form = self._form()
        self._around(1)

    def read_calls(self, text: str, schemas: Schemas, before: Sequence[int]) -> list[Call]:
        """The calls of a turn.

        Args:
            text: with the special tokens, without the end token.
            schemas: of the tools.
            before: ids of what the turn follows.
        """
        return read_calls(text, self.form, schemas, thinking=self._opens_thinking(before))

    def ids(self, calls: list[ToolCall], *, ended: bool, max_tokens: int) -> list[int]:
        """The answers to a turn's calls and the beginning of the next turn.

        Args:
            calls: with what the tools said, in order.
            ended: whether the model wrote its end token, which then is not written again.
            max_tokens: of all outputs together.
        """
        shown = [self._cut(call.output, max_tokens // len(calls)) for call in calls]
        around = self._around(len(shown))
        if ended:
            end = next((end for end in self._ends if around[0].startswith(end)), "")
            around[0] = around[0].removeprefix(end)
        parts = [around[0]]
        for output, following in zip(shown, around[1:], strict=True):
            parts += [self._rendered(output), following]
        return self._encode(parts)

    def _opens_thinking(self, before: Sequence[int]) -> bool:
        opening: list[int] = []
        for id in reversed(before):
            if id in self._headers:
                break
            opening.append(id)
        text: str = self.tokenizer.decode(opening[::-1])
        return text.rfind(_THINK) > text.rfind(_END_THINK)

    def _form(self) -> CallForm:
        """The form in which the template writes a call."""
        call = {"name": _PROBE.name, "arguments": {"x": "fdfast value"}}
        calls = [{"type": "function", "id": "fdfast001", "function": call}]
        called = self._render([{"content": "", "tool_calls": calls}], tools=[_PROBE_SCHEMA])
        if _PROBE.name not in called:
            return FORMS["hermes"]
        header, _, end = self._render([{"content": _MARK}]).rpartition(_MARK)
        written = called.rpartition(_QUESTION)[2].removeprefix(header.rpartition(_QUESTION)[2])
        return find_form(written.removesuffix(end), _PROBE, [_PROBE_SCHEMA])

    def _around(self, count: int) -> list[str]:
        """What the template writes after an assistant's text: before, between and after outputs."""
        outputs = [f"{_OUTPUT} {number}" for number in range(count)]
        after, around = self._after_assistant(outputs), []
        for output in outputs:
            before, found, after = after.partition(output)
            if not found:
                raise InputError(
                    "the tokenizer's chat template does not write messages of the role 'tool'; "
                    "take a model whose template has tools"
                )
            around.append(before)
        return [*around, after]

    def _rendered(self, output: str) -> str:
        """An output as the template writes it: trimmed, say, or quoted as JSON."""
        before, after = self._around(1)
        text = self._after_assistant([output])
        if not text.startswith(before) or not text.endswith(after):
            raise InputError(
                "the tokenizer's chat template writes other text around a tool's answer that "
                f"begins with {output[:40]!r}; take a model whose template does not"
            )
        return text[len(before) : len(text) - len(after)]

    def _after_assistant(self, outputs: list[str]) -> str:
        tools = [{"role": "tool", "content": output} for output in outputs]
        _, mark, after = self._render([{"content": _MARK}, *tools], opened=True).partition(_MARK)
        if not mark:
            raise InputError("the tokenizer's chat template changes what an assistant says")
        return after

    def _render(
        self, said: list[dict[str, Any]], *, tools: Schemas | None = None, opened: bool = False
    ) -> str:
        """A conversation of a question and what follows, by the assistant if it names no role."""
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": _QUESTION}]
        messages += [{"role": "assistant"} | message for message in said]
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except (TemplateError, TypeError) as error:  # TypeError: it adds what is no text
            raise InputError(
                f"the tokenizer's chat template does not take tool calls and answers ({error}); "
                "take a model whose template has tools"
            ) from error
        return text

    def _encode(self, parts: Sequence[str]) -> list[int]:
        """Ids of the template's text and tools' outputs, in turn; the first is the template's."""
        bounds = [0, *itertools.accumulate(map(len, parts))]
        outputs = list(zip(bounds[1::2], bounds[2::2], strict=False))
        return self._plain.encode("".join(parts), outputs)

    def _cut(self, output: str, limit: int) -> str:
        """The two ends of an output that is too long, which say the most, with a note."""
        ids = self._encode(["", output, ""])
        if len(ids) <= limit:
            return output
        head, tail = ids[: limit // 2], ids[len(ids) - limit // 2 :]
        note = f"[... {len(ids) - 2 * (limit // 2)} tokens are left out ...]"
        # A cut within a character leaves U+FFFD where it was.
        begin, end = self.tokenizer.decode(head), self.tokenizer.decode(tail)
        return f"{begin.rstrip(_TORN)}\n{note}\n{end.lstrip(_TORN)}"
