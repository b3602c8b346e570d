"""The tools of an agent that proves: write a Lean file, check it, search a library.

A `Toolbox` is one agent's: its work folder, its limits, what it may search. `call` answers a call
as the model wrote it, with a short text. Whatever the model did wrong is such a text, too, and says
what to do; only a fault of the machine is raised.

The check runs the code of the file in Lean. Words by which Lean code runs programs or touches files
while it is compiled are refused first (`#eval`, `elab`, `IO` and the like); that is a screen, no
sandbox.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fdfast.errors import InputError
from fdfast.lean.filecheck import FileCheck
from fdfast.lean.screen import refuse_context, refuse_text
from fdfast.lean.search import search
from fdfast.lean.workfolder import Refused, WorkFolder

Schema = dict[str, Any]

_RUNS_CODE = re.compile(
    r"(?<![\w'])(?:IO|EIO|BaseIO|d?simproc(?:_decl)?|builtin_\w+|run_\w+|command_elab|term_elab"
    r"|extern|init|tactic_extension)(?![\w'])"
)


@dataclass(frozen=True)
class Limits:
    """What an agent may use.

    Attributes:
        file_bytes: of a file.
        num_files: in the work folder.
        argument_chars: of a call's arguments.
        pattern_chars: of a search's pattern.
        check_seconds: of a check.
        search_seconds: of a search.
        search_lines: of a search's answer.
        line_chars: of each of them.
        output_chars: of any answer, the note about what was cut included.
    """

    file_bytes: int = 64 << 10
    num_files: int = 32
    argument_chars: int = 256 << 10
    pattern_chars: int = 500
    check_seconds: float = 60.0
    search_seconds: float = 10.0
    search_lines: int = 50
    line_chars: int = 300
    output_chars: int = 8000

    def __post_init__(self) -> None:
        """Every limit is positive, and an answer has room for a sentence."""
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"Limits: {name} must be positive; got {value}")
        if self.output_chars < 200:
            raise InputError(f"Limits: output_chars must be at least 200; got {self.output_chars}")


@dataclass(frozen=True)
class ToolResult:
    """The answer to a call.

    Attributes:
        text: what the model reads.
        seconds: how long it took.
        ok: whether the call could be carried out; a check that finds errors was.
    """

    text: str
    seconds: float
    ok: bool


def _schema(name: str, description: str, required: Schema, optional: Schema) -> Schema:
    """A tool in the form that chat templates take as `tools=` (OpenAI's)."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {**required, **optional},
                "required": list(required),
            },
        },
    }


def _text(description: str) -> Schema:
    return {"type": "string", "description": description}


_PATH = _text("Relative path of a Lean file, such as Main.lean or Lemmas/Basic.lean.")
SCHEMAS = {
    "write_file": _schema(
        "write_file",
        "Write a Lean file in the work folder. A file of that name is replaced.",
        {"path": _PATH, "content": _text("The whole text of the file.")},
        {},
    ),
    "check_file": _schema(
        "check_file",
        "Compile a Lean file that was written before, and return Lean's messages with their line "
        "and column.",
        {"path": _PATH},
        {},
    ),
    "search_library": _schema(
        "search_library",
        "Search the Lean files of the library with a regular expression, line by line.",
        {"pattern": _text("Regular expression in Python's syntax, such as theorem.*add_comm.")},
        {
            "path": _text("Search only files whose path contains this text, such as Order/."),
            "ignore_case": {"type": "boolean", "description": "Whether case is ignored."},
        },
    ),
}


def tool_schemas(*, search: bool) -> list[Schema]:
    """The tools as chat templates take them: `apply_chat_template(..., tools=schemas)`.

    Args:
        search: whether there are libraries to search.
    """
    return [schema for name, schema in SCHEMAS.items() if search or name != "search_library"]


_TYPES: dict[str, type] = {"string": str, "boolean": bool}


@dataclass
class Toolbox:
    """One agent's tools; a context manager.

    Attributes:
        folder: the work folder, which exists; whoever made it removes it.
        check: what compiles a file, such as `LeanPool.check_file`; agents may share it.
        libraries: name -> folder, for the search; without any there is no search tool.
        limits: see `Limits`.
        ripgrep: see `search.search`.
    """

    folder: Path
    check: FileCheck
    libraries: Mapping[str, Path] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    ripgrep: str | None = None

    def __post_init__(self) -> None:
        """Open the work folder."""
        for name, library in self.libraries.items():
            if not library.is_dir():
                raise InputError(f"Toolbox: library {name!r} must be a folder; got {library}")
        self._files = WorkFolder(
            self.folder, file_bytes=self.limits.file_bytes, num_files=self.limits.num_files
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the work folder; its files stay."""
        self._files.close()

    @property
    def schemas(self) -> list[Schema]:
        """See `tool_schemas`."""
        return tool_schemas(search=bool(self.libraries))

    def files(self) -> dict[str, str]:
        """The Lean files in the work folder, path -> text; unreadable ones are left out."""
        found = {}
        for path in self._files.files():
            try:
                found[path] = self._files.read(path)
            except Refused:
                continue
        return found

    def call(self, name: str, arguments: str | Mapping[str, object]) -> ToolResult:
        """Carry out a call.

        Args:
            name: the tool's.
            arguments: a JSON object as the model wrote it, or one that is parsed already.

        Raises:
            MachineError: a full disk, no Lean. Never for what the model did.
        """
        began = time.monotonic()
        try:
            text, ok = self._carry_out(name, arguments), True
        except Refused as refused:
            text, ok = str(refused), False
        return ToolResult(self._cut(text), time.monotonic() - began, ok)

    def _tools(self) -> dict[str, Callable[..., str]]:
        tools: dict[str, Callable[..., str]] = {
            "write_file": self._write_file,
            "check_file": self._check_file,
        }
        if self.libraries:
            tools["search_library"] = self._search_library
        return tools

    def _carry_out(self, name: str, arguments: str | Mapping[str, object]) -> str:
        tools = self._tools()
        if name not in tools:
            raise Refused(f"there is no tool {_shown(name)}; the tools are {', '.join(tools)}")
        values = self._parse(name, arguments)
        parameters = SCHEMAS[name]["function"]["parameters"]
        known = parameters["properties"]
        rule = f"{name} takes {', '.join(known)} (needed: {', '.join(parameters['required'])})"
        for key, value in values.items():
            if key not in known:
                raise Refused(f"{name} has no argument {_shown(key)}; {rule}")
            if not isinstance(value, _TYPES[known[key]["type"]]):
                raise Refused(
                    f"{name}: argument '{key}' must be a {known[key]['type']}; got"
                    f" {type(value).__name__}"
                )
        if missing := [key for key in parameters["required"] if key not in values]:
            raise Refused(f"{name}: argument '{missing[0]}' is missing; {rule}")
        return tools[name](**values)

    def _parse(self, name: str, arguments: str | Mapping[str, object]) -> dict[str, object]:
        if isinstance(arguments, Mapping):
            values: object = dict(arguments)
        else:
            if len(arguments) > self.limits.argument_chars:
                raise Refused(
                    f"{name}: the arguments have {len(arguments)} characters, at most"
                    f" {self.limits.argument_chars} are allowed; write less"
                )
            try:
                values = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise Refused(
                    f"{name}: the arguments are not JSON ({_one_line(str(error))}); write an object"
                    ' such as {"path": "Main.lean"}'
                ) from error
        if not isinstance(values, dict):
            raise Refused(
                f"{name}: the arguments must be a JSON object; got {type(values).__name__}; write"
                ' an object such as {"path": "Main.lean"}'
            )
        # An optional argument that is null is one that is left out.
        return {str(key): value for key, value in values.items() if value is not None}

    def _write_file(self, path: str, content: str) -> str:
        self._files.write(path, content)
        lines = content.count("\n") + (not content.endswith("\n") and content != "")
        return f"{path} is written: {lines} lines."

    def _check_file(self, path: str) -> str:
        text = self._files.read(path)
        reason = refuse_context(text).removesuffix(" above the theorem")
        if not reason and (word := _RUNS_CODE.search(text)):
            reason = f"`{word.group()}`"
        if reason:
            raise Refused(f"{path} is not checked: {reason} is not allowed in a file; take it out")
        checked = self.check(text, self.limits.check_seconds)
        counts = [
            sum(m.severity == kind for m in checked.messages) for kind in ("error", "warning")
        ]
        shown = [f"{path}: {_count(counts[0], 'error')}, {_count(counts[1], 'warning')}."]
        if checked.unfinished:
            shown = [f"{path}: not finished: {checked.unfinished}; make the proof simpler."]
        shown += [f"{path}:{message}" for message in checked.messages]
        return "\n".join(shown)

    def _search_library(self, pattern: str, path: str = "", ignore_case: bool = False) -> str:
        if not pattern or len(pattern) > self.limits.pattern_chars:
            raise Refused(
                f"search_library: pattern must have 1 to {self.limits.pattern_chars} characters;"
                f" got {len(pattern)}"
            )
        if reason := refuse_text(pattern) or refuse_text(path):
            raise Refused(f"search_library: {reason}; write plain Unicode text")
        found = search(
            pattern,
            self.libraries,
            ignore_case=ignore_case,
            path=path,
            lines=self.limits.search_lines,
            line_chars=self.limits.line_chars,
            timeout_s=self.limits.search_seconds,
            ripgrep=self.ripgrep,
        )
        if found.error:
            raise Refused(
                f"search_library: pattern {_shown(pattern)} {found.error}; put a backslash before"
                " signs that are meant as they are"
            )
        shown = list(found.lines)
        if found.end == "timeout":
            shown.append(
                f"[stopped after {self.limits.search_seconds:g} s, {_count(len(shown), 'line')} so"
                " far; make the pattern simpler or give a path]"
            )
        elif found.end == "more":
            shown.append(
                f"[cut after {_count(len(shown), 'line')}; there are more: make the pattern"
                " narrower or give a path]"
            )
        return "\n".join(shown) or "No line matches."

    def _cut(self, text: str) -> str:
        limit = self.limits.output_chars
        if len(text) <= limit:
            return text
        keep = limit - len(f"\n[cut: {len(text)} more characters]")
        return f"{text[:keep]}\n[cut: {len(text) - keep} more characters]"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
