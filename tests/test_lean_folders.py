"""The private folders of checks: a killed run's are removed by the next, and nobody else's."""

import os
import subprocess
import sys
import time
from pathlib import Path

from fdfast.lean import folder

GOOD = "theorem good (a : Prop) (h : a) : a :="


def test_folders_of_dead_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = f"fdfast-lean-{folder._machine()}"
    stale = tmp_path / f"{mine}-{dead.pid}-abc"
    kept = [
        tmp_path / f"{mine}-{os.getpid()}-abc",  # ours
        tmp_path / f"{mine}-1-abc",  # a living process of another user, or ours
        tmp_path / f"fdfast-lean-00000000-{dead.pid}-abc",  # of another machine or container
        tmp_path / "fdfast-lean-notes",
        tmp_path / f"other-{dead.pid}-abc",
    ]
    for each in (stale, *kept):
        each.mkdir()
        (each / "file").touch()
    (tmp_path / f"{mine}-{dead.pid}-link").symlink_to(kept[0])
    folder.remove_stale_folders(str(tmp_path))
    assert not stale.exists()
    assert all((each / "file").exists() for each in kept)
    folder.remove_stale_folders(str(tmp_path / "absent"))


def test_a_killed_run_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    code = f"from fdfast.lean import verify; verify({GOOD!r}, {'h ' * 10!r} * 6_000)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    for _ in range(1000):
        if list(tmp_path.glob("fdfast-lean-*/Attempt_*")):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(f"fdfast-lean-*-{process.pid}-*"))
    code = f"from fdfast.lean import verify; assert verify({GOOD!r}, 'h').proved"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.glob("fdfast-lean-*"))
