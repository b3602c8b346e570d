"""Reading tool calls out of a turn, in the form that the model's chat template writes them.

One table, `FORMS`: name -> how a turn is read. Which form a template uses is found by letting it
write a call: the form that reads this call back is the one.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fdfast.errors import InputError

Schemas = Sequence[Mapping[str, Any]]


class Call(NamedTuple):
    """A call as the model wrote it; `fault` says why it is none."""

    name: str
    arguments: str
    fault: str = ""


@dataclass(frozen=True)
class CallForm:
    """A way to write calls.

    Attributes:
        example: what the model is to write.
        read: the calls of a turn; the schemas are those of the tools.
    """

    example: str
    read: Callable[[str, Schemas], list[Call]]


_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_THINK, _END_THINK = "<think>", "</think>"
_JSON = json.JSONDecoder()
_SPACE = re.compile(r"\s*")
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*")
# A value may hold the mark of its end, as text: its end is the one before another mark of the form.
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>(.*?)</parameter>\s*(?=<parameter=|</function>)", re.DOTALL
)
_PARAMETER_MARK = re.compile(r"<parameter=[^>\n]+>")
_END = re.compile(r"\s*</function>\s*</tool_call>")
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_LLAMA = re.compile(r"\s*(?:<\|python_tag\|>\s*|(?=\{\s*\"))")
_LLAMA_NEXT = re.compile(r"\s*(?:;\s*)?(?:<\|python_tag\|>\s*)?")


def read_calls(
    text: str, form: CallForm, schemas: Schemas = (), *, thinking: bool = False
) -> list[Call]:
    """The calls of a turn.

    Args:
        text: the turn, with the special tokens, without its end token.
        form: the template's.
        schemas: of the tools, as chat templates take them.
        thinking: whether the prompt opened a block of thinking in which the turn begins. What
            stands in such a block is no call, and one that does not end holds the whole turn.
    """
    if thinking:
        _, _, text = text.partition(_END_THINK)
    return form.read(text, schemas)


def find_form(written: str, call: Call, schemas: Schemas) -> CallForm:
    """The form of a template.

    Args:
        written: how the template writes the call.
        call: what it was to write.
        schemas: with the call's tool.

    Raises:
        InputError: none of those in the table.
    """
    for form in FORMS.values():
        if form.read(written, schemas) == [call]:
            return form
    known = "; ".join(f"{name}: {form.example}" for name, form in FORMS.items())
    raise InputError(
        f"the tokenizer's chat template writes tool calls in an unknown form, {written!r}; known "
        f"are {known}; take a model of one of these, or add the form to fdfast.rollout.tool_calls"
    )


def _read_marked(text: str, read: Callable[[str, int], tuple[Call, int]]) -> list[Call]:
    """The calls between <tool_call> marks; `read` gives the one that begins at a place, and where
    it ends.
    """
    calls, place = [], 0
    while (start := text.find(_OPEN, place)) >= 0:
        thought = text.find(_THINK, place, start)
        if thought >= 0:  # before the call; within one it is a word like others
            end = text.find(_END_THINK, thought)
            place = len(text) if end < 0 else end
            continue
        call, place = read(text, start + len(_OPEN))
        calls.append(call)
    return calls


def _broken(text: str, start: int, why: str) -> tuple[Call, int]:
    """What begins at a place and is no call: all until the next mark of an end."""
    end = text.find(_CLOSE, start)
    if end < 0:
        why, end = f"the call is not closed; end it with {_CLOSE}", len(text)
    return Call("", text[start:end].strip(), why), end + len(_CLOSE)


def _read_object(text: str, start: int, key: str) -> tuple[Call, int]:
    """The call in a JSON object of `name` and `key`, and where the object ends.

    Raises:
        ValueError, RecursionError: there is no JSON.
    """
    # Of a text of its own, so that the error's columns are the call's.
    record, length = _JSON.raw_decode(text[start:])
    end = start + length
    name = record.get("name") if isinstance(record, dict) else ""
    arguments = record.get(key, {}) if isinstance(record, dict) else None
    # Half of a surrogate pair is no text, and not printable.
    if not (isinstance(name, str) and name and name.isprintable()) or not isinstance(
        arguments, dict | str
    ):
        example = f'{{"name": ..., "{key}": {{...}}}}'
        return Call("", text[start:end], f"a call is {example}"), end
    if isinstance(arguments, str):  # JSON in a string
        return Call(name, arguments.encode(errors="backslashreplace").decode()), end
    return Call(name, json.dumps(arguments)), end


def _hermes_call(text: str, start: int) -> tuple[Call, int]:
    start = _after_space(text, start)
    try:
        call, end = _read_object(text, start, "arguments")
    except (ValueError, RecursionError) as error:
        return _broken(text, start, f"the call is not JSON ({error})")
    end = _after_space(text, end)
    if text.startswith(_CLOSE, end):
        return call, end + len(_CLOSE)
    if call.fault and end == len(text):
        return call, end
    return _broken(text, start, "the call is not JSON (text follows the object)")


def _read_hermes(text: str, schemas: Schemas) -> list[Call]:
    return _read_marked(text, _hermes_call)


def _read_xml(text: str, schemas: Schemas) -> list[Call]:
    types = {
        function["name"]: function.get("parameters", {}).get("properties", {})
        for function in (schema.get("function", schema) for schema in schemas)
    }
    return _read_marked(text, lambda whole, start: _xml_call(whole, start, types))


def _xml_call(text: str, start: int, types: Mapping[str, Any]) -> tuple[Call, int]:
    function = _FUNCTION.match(text, start)
    if function is None:
        return _broken(text, start, f"a call is {FORMS['qwen3-coder'].example}")
    name, place = function[1].strip(), function.end()
    arguments: dict[str, Any] = {}
    while found := _PARAMETER.match(text, place):
        key, value = found[1].strip(), found[2]
        if _PARAMETER_MARK.search(value):
            return _broken(text, start, f"parameter {key} is not closed; end it with </parameter>")
        if key in arguments:
            return _broken(text, start, f"parameter {key} is given twice")
        # The template sets a value on lines of its own.
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(value, types.get(name, {}).get(key, {}))
        place = found.end()
    end = _END.match(text, place)
    if end is None:
        why = "the call is not closed; end it with </parameter></function></tool_call>"
        return _broken(text, start, why)
    return Call(name, json.dumps(arguments)), end.end()


def _typed(value: str, schema: Mapping[str, Any]) -> Any:
    """A value by its schema; text stays as it is, and so does what is not of its type, for the
    tool to refuse.
    """
    kinds = schema.get("type", "string")
    if "string" in ([kinds] if isinstance(kinds, str) else kinds):
        return value
    # Templates write Python's True, False and None.
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_llama(text: str, schemas: Schemas) -> list[Call]:
    thought = _THOUGHT.match(text)
    begun = _LLAMA.match(text, thought.end() if thought else 0)
    if begun is None:
        return []
    calls: list[Call] = []
    place = begun.end()
    while place < len(text) or not calls:
        try:
            call, end = _read_object(text, place, "parameters")
        except (ValueError, RecursionError) as error:
            what = "what follows a call" if calls else "the call"
            calls.append(Call("", text[place:].strip(), f"{what} is not JSON ({error})"))
            break
        calls.append(call)
        following = _LLAMA_NEXT.match(text, end)
        assert following is not None  # it may be empty
        place = following.end()
    return calls


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None  # it may be empty
    return found.end()


FORMS = {
    "hermes": CallForm(f'{_OPEN}{{"name": ..., "arguments": {{...}}}}{_CLOSE}', _read_hermes),
    "qwen3-coder": CallForm(
        f"{_OPEN}<function=NAME><parameter=KEY>value</parameter></function>{_CLOSE}", _read_xml
    ),
    "llama": CallForm('{"name": ..., "parameters": {...}} as the whole turn', _read_llama),
}
