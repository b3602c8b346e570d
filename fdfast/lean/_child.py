"""The worker that runs Lean, one fork for each job: `python -I -S _child.py [LIBRARY]`.

With LIBRARY, libleanshared.so, it loads and initialises that once, which costs 30 ms, and a job is
a fork that calls `lean_main`, which costs 10, or replays a compiled file. Without, a job names the
program that its fork becomes. It speaks the framing of `fdfast._replio`: the line `ready`, then for
each job (a JSON line, a blank line) the answer `{"status": N}` and a blank line.

Only this process writes answers. A job has files in place of our pipes before Lean sees any text,
it cannot open ours through /proc (this process is not dumpable), and whatever it leaves behind is
killed before its answer goes out. When this process is killed, the kernel kills the job.

It imports only small modules and nothing of fdfast, because its start is paid on every restart.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CANNOT_RUN = 97  # exit status for "Lean itself cannot be run"
MAX_FILE_BYTES = 256 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36


def main() -> None:
    """Serve jobs until stdin ends."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # a job's orphans become ours, see _kill_leftovers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lean = None
    if len(sys.argv) > 1:
        try:
            # RTLD_GLOBAL: the library looks its own symbols up by name.
            lean = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
            lean.lean_initialize()
        except (OSError, AttributeError) as error:
            os.write(2, f"{error}\n".encode(errors="replace"))
            os._exit(CANNOT_RUN)
    os.write(1, b"ready\n")
    own = os.getpid()
    while line := sys.stdin.buffer.readline():
        if line == b"\n":
            continue
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(libc, lean, own, job)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        _kill_leftovers()
        os.write(1, b'{"status":%d}\n\n' % status)
    os._exit(0)


def _kill_leftovers() -> None:
    """Kill what the job started and did not wait for, and what that started."""
    while True:
        try:
            pid = os.waitpid(-1, os.WNOHANG)[0]
        except ChildProcessError:
            return
        if pid:
            continue
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", "rb") as children:
                for child in children.read().split():
                    os.kill(int(child), signal.SIGKILL)
        os.waitpid(-1, 0)


def _run(libc: ctypes.CDLL, lean: ctypes.CDLL | None, parent: int, job: dict[str, str]) -> None:
    """Become the job: its files in place of our pipes, then Lean."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
        argv = [os.fsencode(argument) for argument in job["arguments"]]
        if lean is None:
            os.execv(job["program"], [os.fsencode(job["program"]), *argv])
        if job["replay"]:
            sys.path.append(os.path.dirname(os.path.abspath(__file__)))
            import _replay  # type: ignore[import-not-found] # this is a script, no module

            refused = _replay.replay(lean, job["replay"])
            os.write(2, refused.encode(errors="replace"))
            os._exit(bool(refused))
        argv.insert(0, b"lean")
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
