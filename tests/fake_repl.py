"""The fake REPL of `tests/cpp/fake_repl.cpp`, compiled once, and the words it is given."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

from fdfast.errors import MachineError
from fdfast.files import build_once, cache_dir

SOURCE = Path(__file__).parent / "cpp" / "fake_repl.cpp"
FLAGS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror")


def fake_repl() -> Path:
    """The compiled fake REPL."""
    return compiled(SOURCE)


def compiled(source: Path, *more_flags: str) -> Path:
    """The program of one C++ file, in the user's cache; compiled when the file is new there.

    Args:
        source: the file.
        more_flags: put behind it on the compiler's command line.

    Raises:
        MachineError: there is no compiler, or it refuses the file.
    """
    compiler = shutil.which("c++")
    if compiler is None:
        raise MachineError(f"{source.name}: no C++ compiler; install one (apt install g++)")
    identity = " ".join((compiler, *FLAGS, *more_flags)).encode() + source.read_bytes()
    name = f"{source.stem}-{hashlib.sha256(identity).hexdigest()[:20]}"

    def build(folder: Path) -> None:
        command = [compiler, *FLAGS, "-o", str(folder / source.stem), str(source), *more_flags]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise MachineError(f"{source.name} does not compile: {done.stderr[-2000:]}")

    return build_once(cache_dir() / "tests" / name, build) / source.stem


def command(*wishes: str, **values: int | str) -> bytes:
    """A command for it: `command("die_after", id=3)` is `{"cmd": "fake[die_after id=3]"}`."""
    words = [*wishes, *(f"{name}={value}" for name, value in values.items())]
    return json.dumps({"cmd": f"fake[{' '.join(words)}]"}).encode()
