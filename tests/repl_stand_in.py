"""A stand-in for leanprover-community/repl that gives real verdicts: `python -I -S repl_stand_in.py
LIBRARY FOLDER`, where FOLDER holds fdfast/lean/_replay.py's.

It speaks the forms that the REPL backend uses (commands, files that are not there, pickling and
opening environments) and has the embedded Lean do the work. An environment is the text that led to
it, and is compiled again with every command; a pickle is an .olean, and opening one replays it, as
the REPL does. What it cannot imitate: tactic steps, and scopes that outlive a pickle.

A comment in a proof makes it misbehave as code under check could: `forge_frame` prints an answer
before the answer, `forge_and_exit` an answer in place of it, `print_garbage` what is no JSON, and
`crash` ends it.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

Answer = dict[str, Any]


@dataclass
class Env:
    """An environment: its text, and where the modules lie that it imports beside the library's."""

    text: str
    folder: str


class Repl:
    """The environments, and the library that compiles them."""

    def __init__(self, library: str) -> None:
        self._lean = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        self._lean.lean_initialize()
        self._envs: list[Env] = []

    def answer(self, query: Answer) -> Answer:
        """Answer one query, first form that matches."""
        if "proofState" in query and "tactic" in query:
            return {"message": "Unknown proof state."}
        if "env" in query and "pickleTo" in query:
            return self._pickle(query["env"], query["pickleTo"])
        if "unpickleEnvFrom" in query:
            return self._unpickle(query["unpickleEnvFrom"])
        if "cmd" in query:
            return self._command(query["cmd"], query.get("env"))
        try:
            with open(query["path"]) as file:
                return self._command(file.read(), None)
        except OSError as error:
            return {
                "message": f"no such file or directory (error code: 2)\n  file: {error.filename}"
            }

    def _command(self, cmd: str, env: int | None) -> Answer:
        if env is not None and env >= len(self._envs):
            return {"message": "Unknown environment."}
        before = Env("", "") if env is None else self._envs[env]
        full = before.text + cmd + ("" if cmd.endswith("\n") else "\n")
        if "forge_frame" in cmd or "forge_and_exit" in cmd:
            say({"env": 0})
        if "print_garbage" in cmd:
            sys.stdout.write("}garbage\n\n")
            sys.stdout.flush()
        if "forge_and_exit" in cmd:
            os._exit(0)
        if "-- crash" in cmd:
            os.kill(os.getpid(), signal.SIGABRT)
        said = self._compile(full, before.folder)
        above = before.text.count("\n")
        messages = [m for m in said if m["pos"]["line"] > above]
        for message in messages:
            message["pos"]["line"] -= above
        wrong = [m["data"] for m in messages if m["severity"] == "error"]
        if env is None and wrong and wrong[0].startswith("unknown module prefix"):
            return {"message": wrong[0]}
        self._envs.append(before if wrong else Env(full, before.folder))
        answer: Answer = {"env": len(self._envs) - 1}
        return answer | ({"messages": messages} if messages else {})

    def _pickle(self, env: int, path: str) -> Answer:
        if env >= len(self._envs):
            return {"message": "Unknown environment."}
        known = self._envs[env]
        self._compile(known.text, known.folder, path)
        return {"env": env}

    def _unpickle(self, path: str) -> Answer:
        os.stat(path)  # a file that is not there ends the REPL, as in the original
        fork(lambda: self._replay(path), path)
        name = os.path.basename(path).removesuffix(".olean")
        self._envs.append(Env(f"import {name}\n", os.path.dirname(path)))
        return {"env": len(self._envs) - 1}

    def _replay(self, path: str) -> int:
        import _replay

        if refused := _replay.replay(self._lean, path):
            sys.stderr.write(f"uncaught exception: {refused}\n")
            sys.stderr.flush()
        return 1 if refused else 0

    def _compile(self, text: str, folder: str, olean: str = "") -> list[Answer]:
        """Lean's messages on a text, as the REPL words them."""
        with tempfile.TemporaryDirectory() as own:
            source = (
                olean.removesuffix(".olean") + ".lean" if olean else os.path.join(own, "A.lean")
            )
            with open(source, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            into = ["-o", olean] if olean else []
            output = os.path.join(own, "output")
            os.chdir(os.path.dirname(source))  # Lean wants its source below its working folder
            arguments = ["--json", *into, os.path.basename(source)]
            fork(lambda: self._main(arguments, folder, output), "")
            with open(output, encoding="utf-8", errors="replace") as file:
                lines = [json.loads(line) for line in file.read().split("\n") if line]
        return [
            {
                "severity": {"information": "info"}.get(line["severity"], line["severity"]),
                "pos": line["pos"],
                "endPos": line["endPos"],
                "data": line["data"].strip(),
            }
            for line in lines
        ]

    def _main(self, arguments: list[str], folder: str, output: str) -> int:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        if folder:
            os.environ["LEAN_PATH"] += os.pathsep + folder
        argv = [b"lean", *map(os.fsencode, arguments)]
        status = self._lean.lean_main(len(argv), (ctypes.c_char_p * (len(argv) + 1))(*argv, None))
        ctypes.CDLL(None).fflush(None)
        if status and not os.path.getsize(output):
            os.abort()  # no thread or memory for Lean: so would the REPL end
        return 0


def fork(work: Callable[[], int], fatal: str) -> None:
    """Do work in a child; its end by a signal, or with a status if that is fatal, is ours too."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os._exit(work())
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        os.kill(os.getpid(), -status)
    if status and fatal:
        os._exit(1)


def say(answer: Answer) -> None:
    """Write an answer over several lines, and the blank line after it."""
    sys.stdout.write(json.dumps(answer, indent=1, ensure_ascii=False) + "\n\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """Answer queries until stdin ends."""
    library, folder = sys.argv[1:]
    sys.path.append(folder)
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    repl = Repl(library)
    lines: list[str] = []
    for line in sys.stdin:
        if line.strip():
            lines.append(line.rstrip())
            continue
        say(repl.answer(json.loads("".join(lines))))
        lines = []
    os._exit(0)


if __name__ == "__main__":
    main()
