"""The wire protocol of leanprover-community/repl (commit 8948401) as typed requests and answers.

A request becomes one compact JSON line by `to_json`; an answer's parsed JSON becomes a
`CommandResponse`, a `ProofStepResponse` or an `Error` by `read_command` and `read_proof_step`.
Names are the protocol's, in snake case: `all_tactics` is `allTactics` on the wire. An optional
field that is None is left out. What an answer lacks though the protocol demands it, or has in
another type, is a MachineError that names the field.

The forms were read in the REPL's documentation and sources; they were not run against its binary
here, since no machine of ours has a compiled one.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from fdfast.errors import InputError, MachineError

_PROTOCOL = "fdfast speaks the protocol of leanprover-community/repl at commit 8948401"
_Item = TypeVar("_Item")


def _wire_name(name: str) -> str:
    """A field's name on the wire: `end_pos` is `endPos`."""
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


@dataclass(frozen=True)
class Request:
    """What all requests share."""

    def to_json(self) -> bytes:
        """Return the request as one line of UTF-8, without the blank line that ends it.

        Raises:
            InputError: a text in it is no Unicode.
        """
        record = {
            _wire_name(field.name): value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        try:
            return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"repl: the text of a request must be Unicode; got a lone surrogate at character"
                f" {error.start} of its JSON"
            ) from error


@dataclass(frozen=True)
class Command(Request):
    """Run Lean commands; answered by a `CommandResponse`.

    Attributes:
        cmd: their text.
        env: the environment to run them in; None begins a new one, where `import` may stand.
        all_tactics: list every tactic step.
        root_goals: list the goal at the start of every proof as a sorry.
        infotree: `full`, `tactics`, `original` or `substantive`; anything else is ignored.
    """

    cmd: str
    env: int | None = None
    all_tactics: bool | None = None
    root_goals: bool | None = None
    infotree: str | None = None


@dataclass(frozen=True)
class File(Request):
    """Run the file at `path` in a new environment; answered by a `CommandResponse`."""

    path: str
    all_tactics: bool | None = None
    root_goals: bool | None = None
    infotree: str | None = None


@dataclass(frozen=True)
class ProofStep(Request):
    """Run one tactic in a proof state; answered by a `ProofStepResponse`."""

    proof_state: int
    tactic: str


@dataclass(frozen=True)
class PickleEnvironment(Request):
    """Write an environment to a file; answered by a `CommandResponse` with the same `env`.

    `env` is None where the pool puts it in, from the answer before.
    """

    pickle_to: str
    env: int | None = None


@dataclass(frozen=True)
class UnpickleEnvironment(Request):
    """Read an environment from a file; answered by a `CommandResponse` with its new `env`."""

    unpickle_env_from: str


@dataclass(frozen=True)
class PickleProofState(Request):
    """Write a proof state to a file; answered by a `ProofStepResponse`."""

    proof_state: int
    pickle_to: str


@dataclass(frozen=True)
class UnpickleProofState(Request):
    """Read a proof state from a file, on top of `env` if given; answered by a
    `ProofStepResponse`."""

    unpickle_proof_state_from: str
    env: int | None = None


@dataclass(frozen=True)
class Pos:
    """A place in the text of a request: the line from 1, the column from 0 in characters."""

    line: int
    column: int


@dataclass(frozen=True)
class ReplMessage:
    """One message of Lean; `severity` is `trace`, `info`, `warning` or `error`."""

    pos: Pos
    end_pos: Pos | None
    severity: str
    data: str


@dataclass(frozen=True)
class Sorry:
    """A hole, its goal, and the proof state in which tactics can be tried at it."""

    goal: str
    proof_state: int | None
    pos: Pos | None
    end_pos: Pos | None


@dataclass(frozen=True)
class Tactic:
    """One tactic step, with the goals before it and the constants it uses."""

    pos: Pos
    end_pos: Pos
    goals: str
    tactic: str
    proof_state: int | None
    used_constants: tuple[str, ...]


@dataclass(frozen=True)
class CommandResponse:
    """The answer to commands, files and environments; `infotree` is the JSON as it came."""

    env: int
    messages: tuple[ReplMessage, ...] = ()
    sorries: tuple[Sorry, ...] = ()
    tactics: tuple[Tactic, ...] = ()
    infotree: object = None


@dataclass(frozen=True)
class ProofStepResponse:
    """The answer to tactics and proof states; `proof_status` is `Completed` or says what lacks."""

    proof_state: int
    goals: tuple[str, ...]
    proof_status: str
    messages: tuple[ReplMessage, ...] = ()
    sorries: tuple[Sorry, ...] = ()
    traces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Error:
    """The answer to a request that cannot be carried out, such as an unknown environment."""

    message: str


def read_command(answer: object) -> CommandResponse | Error:
    """Read the answer to a `Command`, `File`, `PickleEnvironment` or `UnpickleEnvironment`.

    Raises:
        MachineError: it is none; the message names the field.
    """
    record = _Record(answer, "answer")
    if record.is_error():
        return Error(record.text("message"))
    return CommandResponse(
        env=record.whole("env"),
        messages=record.each("messages", _message),
        sorries=record.each("sorries", _sorry),
        tactics=record.each("tactics", _tactic),
        infotree=record.fields.get("infotree"),
    )


def read_proof_step(answer: object) -> ProofStepResponse | Error:
    """Read the answer to a `ProofStep`, `PickleProofState` or `UnpickleProofState`.

    Raises:
        MachineError: it is none; the message names the field.
    """
    record = _Record(answer, "answer")
    if record.is_error():
        return Error(record.text("message"))
    return ProofStepResponse(
        proof_state=record.whole("proofState"),
        goals=record.texts("goals", needed=True),
        proof_status=record.text("proofStatus"),
        messages=record.each("messages", _message),
        sorries=record.each("sorries", _sorry),
        traces=record.texts("traces"),
    )


class _Record:
    """A JSON object with its place in the answer, for errors."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(where, "an object", value)
        self.fields: dict[str, object] = value
        self._where = where

    def is_error(self) -> bool:
        """Whether it is `{"message": ...}` and nothing else."""
        return set(self.fields) == {"message"}

    def whole(self, name: str) -> int:
        value = self._needed(name, "a whole number")
        if type(value) is not int or value < 0:  # a bool is an int to Python
            _refuse(self._path(name), "a whole number", value)
        return value

    def optional_whole(self, name: str) -> int | None:
        return None if self.fields.get(name) is None else self.whole(name)

    def text(self, name: str) -> str:
        value = self._needed(name, "a string")
        if not isinstance(value, str):
            _refuse(self._path(name), "a string", value)
        return value

    def texts(self, name: str, *, needed: bool = False) -> tuple[str, ...]:
        if needed:
            self._needed(name, "a list")
        items = self._list(name)
        for number, item in enumerate(items):
            if not isinstance(item, str):
                _refuse(f"{self._path(name)}[{number}]", "a string", item)
        return tuple(str(item) for item in items)

    def each(self, name: str, read: Callable[["_Record"], _Item]) -> tuple[_Item, ...]:
        """The items of a list, an absent list being empty."""
        path = self._path(name)
        return tuple(
            read(_Record(item, f"{path}[{number}]")) for number, item in enumerate(self._list(name))
        )

    def pos(self, name: str) -> Pos:
        place = _Record(self._needed(name, "an object"), self._path(name))
        return Pos(place.whole("line"), place.whole("column"))

    def optional_pos(self, name: str) -> Pos | None:
        return None if self.fields.get(name) is None else self.pos(name)

    def _list(self, name: str) -> list[object]:
        value = self.fields.get(name, [])
        if not isinstance(value, list):
            _refuse(self._path(name), "a list", value)
        return value

    def _needed(self, name: str, rule: str) -> object:
        if name not in self.fields:
            raise MachineError(
                f"repl: {self._path(name)} must be {rule}; it is missing; {_PROTOCOL}"
            )
        return self.fields[name]

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}"


def _refuse(where: str, rule: str, value: object) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise MachineError(f"repl: {where} must be {rule}; got {shown}; {_PROTOCOL}")


def _message(record: _Record) -> ReplMessage:
    return ReplMessage(
        pos=record.pos("pos"),
        end_pos=record.optional_pos("endPos"),
        severity=record.text("severity"),
        data=record.text("data"),
    )


def _sorry(record: _Record) -> Sorry:
    return Sorry(
        goal=record.text("goal"),
        proof_state=record.optional_whole("proofState"),
        pos=record.optional_pos("pos"),
        end_pos=record.optional_pos("endPos"),
    )


def _tactic(record: _Record) -> Tactic:
    return Tactic(
        pos=record.pos("pos"),
        end_pos=record.pos("endPos"),
        goals=record.text("goals"),
        tactic=record.text("tactic"),
        proof_state=record.optional_whole("proofState"),
        used_constants=record.texts("usedConstants"),
    )
