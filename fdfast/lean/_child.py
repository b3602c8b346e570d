"""The process that holds Lean: `python -I -S _child.py LIBRARY PARENT_PID`.

It loads and initialises libleanshared.so once, which costs 50 ms, then runs each job in a fork,
which costs 10. A job is a JSON line on stdin; the answers are lines on stdout: `ready`, then `pid
N` and `end STATUS` for each job. A finished job is reaped when the parent has sent an empty line,
so until then the parent may kill its process group by id.

It imports only small modules and nothing of fdfast, because its start is paid on every check.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CANNOT_RUN = 97  # exit status for "Lean itself cannot be run"
MAX_FILE_BYTES = 256 << 20
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve jobs until stdin ends."""
    library, parent = sys.argv[1:]
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # the parent died before the line above: nobody waits for us
        os._exit(CANNOT_RUN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        # RTLD_GLOBAL: the library looks its own symbols up by name.
        lean = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        lean.lean_initialize()
    except (OSError, AttributeError) as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        os._exit(CANNOT_RUN)
    os.write(1, b"ready\n")
    while line := sys.stdin.buffer.readline():
        job = json.loads(line)
        own = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run(libc, lean, own, job)
        os.write(1, b"pid %d\n" % pid)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        os.write(1, b"end %d\n" % status)
        sys.stdin.buffer.readline()
        os.waitpid(pid, 0)
    os._exit(0)


def _run(libc: ctypes.CDLL, lean: ctypes.CDLL, parent: int, job: dict[str, str]) -> None:
    """Become the job: a session of its own, its files in place of our pipes, then `lean_main`."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    if os.getppid() != parent:
        os._exit(CANNOT_RUN)
    try:
        os.chdir(job["folder"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        files = (nothing, *(os.open(job[name], flags, 0o600) for name in ("stderr", "stdout")))
        for target, file in zip((0, 2, 1), files, strict=True):
            os.dup2(file, target)
        os.closerange(3, max(files) + 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
        os.environ["LEAN_PATH"] = job["lean_path"]
        argv = [b"lean", *(os.fsencode(argument) for argument in job["arguments"])]
        status = lean.lean_main(len(argv), (ctypes.c_char_p * (len(argv) + 1))(*argv, None))
    except BaseException as error:  # of whatever kind: Python's exit status 1 would pass for Lean's
        os.write(2, f"{error!r}\n".encode(errors="replace"))
        os._exit(CANNOT_RUN)
    # os._exit, since unwinding Lean's threads costs time and can hang; it does not flush C's
    # buffers.
    libc.fflush(None)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
