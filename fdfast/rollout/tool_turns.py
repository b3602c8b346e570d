"""Turns that end in tool calls: reading the calls, and writing the answers as the template does.

The answers' ids are what the chat template puts after the assistant's text; what the model wrote is
never rendered again.
"""

import json
import re
from typing import Any, NamedTuple

from fdfast.errors import InputError
from fdfast.rollout.trajectory import ToolCall

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
# A text that no template changes, to find where the assistant's own ends.
_MARK = "fdfast assistant turn"
_OUTPUT = "fdfast tool output"


class Call(NamedTuple):
    """A call as the model wrote it; `fault` says why it is none."""

    name: str
    arguments: str
    fault: str = ""


def read_calls(text: str) -> list[Call]:
    """The calls of a turn, in the form of Qwen's and Hermes' templates: JSON objects of `name` and
    `arguments` between <tool_call> marks.
    """
    calls = []
    for found in _CALL.finditer(text):
        try:
            record = json.loads(found[1])
        except (ValueError, RecursionError) as error:
            calls.append(Call("", found[1], f"the call is not JSON ({error})"))
            continue
        name = record.get("name") if isinstance(record, dict) else None
        arguments = record.get("arguments", {}) if isinstance(record, dict) else None
        if not isinstance(name, str) or not isinstance(arguments, dict | str):
            calls.append(Call("", found[1], 'a call is {"name": ..., "arguments": {...}}'))
            continue
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(Call(name, written))
    return calls


class ToolTurns:
    """Writes tools' answers for one tokenizer.

    Args:
        tokenizer: its chat template must know the role `tool`.

    Raises:
        InputError: the template does not write a tool's answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        one = self._after_assistant([_OUTPUT])
        if _OUTPUT not in one:
            raise InputError(
                "the tokenizer's chat template does not write messages of the role 'tool'; take a "
                "model whose template has tools"
            )

    def read_calls(self, text: str) -> list[Call]:
        """The calls of a turn, in the template's form."""
        return read_calls(text)

    def ids(self, calls: list[ToolCall], *, ended: bool, max_tokens: int) -> list[int]:
        """The answers to a turn's calls and the beginning of the next turn.

        Args:
            calls: with what the tools said, in order.
            ended: whether the model wrote its end token, which then is not written again.
            max_tokens: of all outputs together.
        """
        shown = [self._cut(call.output, max_tokens // len(calls)) for call in calls]
        text = self._after_assistant(shown)
        end = self.tokenizer.eos_token
        if ended and end and text.startswith(end):
            text = text[len(end) :]
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _after_assistant(self, outputs: list[str]) -> str:
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _MARK},
            *({"role": "tool", "content": output} for output in outputs),
        ]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        _, mark, after = text.rpartition(_MARK)
        if not mark:
            raise InputError("the tokenizer's chat template changes what an assistant says")
        return after

    def _cut(self, output: str, limit: int) -> str:
        """The two ends of an output that is too long, which say the most, with a note."""
        ids = self.tokenizer(output, add_special_tokens=False).input_ids
        if len(ids) <= limit:
            return output
        head, tail = ids[: limit // 2], ids[len(ids) - limit // 2 :]
        note = f"[... {len(ids) - 2 * (limit // 2)} tokens are left out ...]"
        return f"{self.tokenizer.decode(head)}\n{note}\n{self.tokenizer.decode(tail)}"
