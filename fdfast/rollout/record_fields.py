"""The fields of a trajectory's record and what each may hold: one table for checks and columns.

A spec is a scalar's name, a frozenset of the values there are, [spec] for a list, {name: spec} for
an object, (spec,) for what may be null.
"""

import math
import re
from typing import Any, get_args

from fdfast.lean.verdict import Kind, Level
from fdfast.rollout.trajectory import End

FORMAT = 1

MESSAGE = {"severity": "text", "line": "int", "column": "int", "text": "text"}
VERDICT = {
    "kind": frozenset(get_args(Kind)),
    "messages": [MESSAGE],
    "reason": "text",
    "level": frozenset(get_args(Level)),
}
TOOL_CALL = {
    "name": "text",
    "arguments": "text",
    "output": "text",
    "ok": "flag",
    "seconds": "number",
    "position": "int",
}
# In the order of a line: what a reader looks for stands before the long lists.
FIELDS: dict[str, Any] = {
    "format": "int",
    "problem": "text",
    "step": ("int",),
    "evaluation": "flag",
    "seed": "int",
    "model": "text",
    "verdict": (VERDICT,),
    "proof": "text",
    "end": frozenset(get_args(End)),
    "waited_s": "number",
    "statement": "text",
    "completion": "text",
    "feedback": ("text",),
    "tool_calls": [TOOL_CALL],
    "prompt": "text",
    "tokens": ["text"],
    "ids": ["id"],
    "wrote": ["flag"],
    "logprobs": ["number"],
    "student_logprobs": (["number"],),
    "teacher_logprobs": (["number"],),
    "prompt_ids": ["id"],
}

_RULES = {
    "text": "text",
    "int": "a whole number of 64 bits",
    "id": "a token id, a whole number from 0 below 2**31",
    "number": "a finite number",
    "flag": "true or false",
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class FieldError(ValueError):
    """A value that is not what it must be: which one, the rule, and what it is."""

    def __init__(self, rule: str, *values: object) -> None:
        super().__init__(rule)
        self.rule, self.where = rule, ""
        shown = map(repr, values)
        self.got = "".join(f"; got {s if len(s) <= 60 else f'{s[:57]}...'}" for s in shown)

    def __str__(self) -> str:
        return f"field '{self.where}' {self.rule}{self.got}"

    def within(self, outer: str) -> "FieldError":
        """The same, seen from the object or list around."""
        inner = self.where
        self.where = f"{outer}{'.' if inner and not inner.startswith('[') else ''}{inner}"
        return self


def checked(value: Any, spec: Any) -> Any:
    """The value as a file holds it: lists for tuples, floats for whole numbers where a field is a
    number, no lone surrogates, keys in the table's order.

    Raises:
        FieldError: it does not fit its spec.
    """
    if isinstance(spec, tuple):
        return None if value is None else checked(value, spec[0])
    if isinstance(spec, list):
        return _checked_list(value, spec[0])
    if isinstance(spec, dict):
        return _checked_object(value, spec)
    if isinstance(spec, frozenset):
        if type(value) not in (str, int) or value not in spec:
            raise FieldError(f"must be one of {', '.join(map(str, sorted(spec)))}", value)
        return value
    if isinstance(value, bool):
        fits = spec == "flag"
    elif isinstance(value, int):
        low, high = (0, 2**31) if spec == "id" else (-(2**63), 2**63)
        fits = spec in ("int", "id", "number") and low <= value < high
    elif isinstance(value, float):
        fits = spec == "number" and math.isfinite(value)
    else:
        fits = spec == "text" and isinstance(value, str)
    if not fits:
        raise FieldError(f"must be {_RULES[spec]}", value)
    if spec == "number":
        return float(value)
    return _SURROGATE.sub("\ufffd", value) if spec == "text" else value


def _checked_list(value: Any, spec: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise FieldError("must be a list", value)
    found = []
    for index, item in enumerate(value):
        try:
            found.append(checked(item, spec))
        except FieldError as wrong:
            raise wrong.within(f"[{index}]") from None
    return found


def _checked_object(value: Any, spec: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError("must be an object", value)
    if unknown := sorted(set(value) - set(spec), key=str):
        rule = f"is not known in format {FORMAT}"
        # As repr spells it: a key of a strange file may hold a terminal's escapes.
        raise FieldError(rule, value[unknown[0]]).within(repr(unknown[0])[1:-1])
    found = {}
    for name, inner in spec.items():
        if name not in value:
            raise FieldError("is missing").within(name)
        try:
            found[name] = checked(value[name], inner)
        except FieldError as wrong:
            raise wrong.within(name) from None
    return found
