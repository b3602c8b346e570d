"""Whatever a worker does, every command is answered exactly once, and the next one works."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from fdfast._replio import Answer, Pool
from tests.fake_repl import command, fake_repl
from tests.replio_pools import (
    MIB,
    PATIENCE_S,
    PROBE,
    alive,
    ask,
    assert_answers,
    eventually,
    pool_of,
)

ROOT = Path(__file__).parent.parent


def assert_between_two_good_ones(pool: Pool, bad: bytes, **options: Any) -> Answer:
    """Neither the command before nor the one after the bad one notices it; returns its answer."""
    before, answer, after = (
        pool.submit([text], **more)[0]
        for text, more in ((command(id=1), {}), (bad, options), (command(id=3), {}))
    )
    for ticket, number in ((after, 3), (before, 1)):
        good = pool.wait(ticket, PATIENCE_S)
        assert good is not None
        assert_answers(good, number)
    found = pool.wait(answer, PATIENCE_S)
    assert found is not None
    return found


def child_of(answer: Answer) -> int:
    """The process that the command left behind, as it says on stderr."""
    return int(answer.stderr.split(b"child ")[1].split()[0])


@pytest.mark.parametrize("when", ["die_before", "die_during"])
def test_a_worker_killed_before_or_during_an_answer_loses_that_command_alone(when: str) -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command(when, id=2, size=100_000))
        assert answer.end == "crashed"
        assert answer.status == -signal.SIGKILL
        assert not alive(answer.pid)


def test_a_worker_killed_after_an_answer_has_answered() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command("die_after", id=2))
        assert_answers(answer, 2)
        assert pool.stats()["restarts"] == 1


def test_an_answer_whose_worker_dies_before_the_probe_is_not_believed() -> None:
    # A proof can print what it likes and then end the process.
    with pool_of(probe=PROBE) as pool:
        answer = assert_between_two_good_ones(pool, command("die_after", id=2))
        assert answer.end in ("crashed", "forged")


def test_a_worker_killed_from_outside_while_it_works(tmp_path: Path) -> None:
    with pool_of() as pool:
        ask(pool, command())
        begun = tmp_path / "begun"
        text = json.dumps({"pickleTo": str(begun), "env": 0, "cmd": "fake[hang]"})
        (ticket,) = pool.submit([text.encode()])
        assert eventually(begun.exists)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGKILL)
        answer = pool.wait(ticket, PATIENCE_S)
        assert answer is not None
        assert (answer.end, answer.status, answer.pid) == ("crashed", -signal.SIGKILL, pid)
        assert_answers(ask(pool, command(id=1))[0], 1)


def test_workers_killed_from_outside_while_idle_lose_nothing() -> None:
    with pool_of(workers=2) as pool:
        for _ in range(20):
            for number, answer in enumerate(ask(pool, *(command(id=i) for i in range(4)))):
                assert_answers(answer, number)
            pids = pool.pids()
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            # A process that is being killed may still take a command; one that is gone has not.
            assert eventually(lambda pids=pids: not any(map(alive, pids)))


def test_a_worker_that_ignores_sigterm_is_killed_at_the_deadline() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(
            pool, command("ignore_sigterm", "hang"), timeout_s=0.2
        )
        assert answer.end == "timeout"
        assert not alive(answer.pid)


def test_closing_kills_a_worker_that_ignores_sigterm() -> None:
    with pool_of() as pool:
        (ticket,) = pool.submit([command("ignore_sigterm", "hang")])
        assert eventually(lambda: pool.stats()["running"] == 1)
        start = time.monotonic()
        pool.close()
        assert time.monotonic() - start < 5
        answer = pool.wait(ticket)
        assert answer is not None
        assert answer.end == "cancelled"


@pytest.mark.parametrize("wish", ["grandchild", "escapee"])
def test_a_grandchild_that_keeps_stdout_open_delays_nothing(wish: str) -> None:
    with pool_of() as pool:
        start = time.monotonic()
        answer = assert_between_two_good_ones(pool, command("die_before", **{wish: 15}))
        assert time.monotonic() - start < 10
        assert answer.end == "crashed"
        if wish == "grandchild":
            assert eventually(lambda: not alive(child_of(answer)), 5)
        else:  # it left our process group: nobody but its own clock ends it
            os.kill(child_of(answer), signal.SIGKILL)


def test_a_grandchild_of_a_worker_that_answers_dies_with_it() -> None:
    with pool_of() as pool:
        (answer,) = ask(pool, command(id=1, grandchild=60))
        assert_answers(answer, 1)
        child = answer.json()["child"]
        assert_answers(ask(pool, command(id=2))[0], 2)
        assert alive(child)
    assert not alive(child)


def test_a_process_for_one_command_whose_grandchild_keeps_stdout_open() -> None:
    with pool_of(mode="once") as pool:
        start = time.monotonic()
        (answer,) = ask(pool, command(id=1, grandchild=15))
        assert time.monotonic() - start < 10
        assert answer.status == 0
        assert_answers(answer, 1)


def test_a_mebibyte_on_stderr_blocks_nobody_and_its_end_is_kept() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command(id=2, stderr=MIB))
        assert_answers(answer, 2)
        crashed = assert_between_two_good_ones(pool, command("die_before", stderr=MIB))
        assert crashed.end == "crashed"
        assert crashed.stderr.endswith(b"e" * 1000 + b"\n")
        assert len(crashed.stderr) <= 64 << 10


def test_an_answer_of_64_mib_is_whole() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command(id=2, size=64 * MIB))
        assert_answers(answer, 2)
        (message,) = answer.json()["messages"]
        assert message["data"] == "x" * (64 * MIB)
        assert len(answer.raw) > 64 * MIB


def test_an_answer_over_the_limit_ends_its_worker() -> None:
    with pool_of(answer_bytes=MIB) as pool:
        answer = assert_between_two_good_ones(pool, command(id=2, size=8 * MIB))
        assert answer.end == "overflow"
        assert not alive(answer.pid)


def test_a_frame_that_is_cut_in_the_middle_is_no_json() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command("cut", id=2, size=1000))
        assert answer.end == "answer"
        with pytest.raises(ValueError, match=r"\d+"):
            answer.json()
        assert answer.raw.startswith(b'{"id": 2')


def test_half_an_answer_is_a_timeout_and_is_shown() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command("half", id=2, size=1000), timeout_s=0.2)
        assert answer.end == "timeout"
        assert answer.raw.startswith(b'{"id": 2')


def test_bytes_that_are_no_utf8_are_kept_and_no_json() -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command("no_utf8", id=2))
        assert answer.end == "answer"
        assert b"\xff\xfe\xc3(" in answer.raw
        with pytest.raises(ValueError, match=r"\d+") as error:
            answer.json()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [10_000, 5_000_000])
def test_deep_json_is_refused_without_harm(depth: int) -> None:
    with pool_of() as pool:
        answer = assert_between_two_good_ones(pool, command(id=2, deep=depth))
        assert answer.end == "answer"
        with pytest.raises(ValueError, match="deep"):
            answer.json()
        (shallow,) = ask(pool, command(id=4, deep=100))
        assert_answers(shallow, 4)


def test_a_worker_that_never_answers_is_killed_at_the_deadline_and_holds_up_nobody() -> None:
    with pool_of(workers=2) as pool:
        tickets = pool.submit([command("hang")], timeout_s=1.0)
        start = time.monotonic()
        for number, answer in enumerate(ask(pool, *(command(id=i) for i in range(50)))):
            assert_answers(answer, number)
        assert time.monotonic() - start < 0.9
        answer = pool.wait(tickets[0], PATIENCE_S)
        assert answer is not None
        assert answer.end == "timeout"
        assert 1.0 <= answer.seconds < 2.0
        assert not alive(answer.pid)


def test_a_worker_that_closes_stdout_has_ended() -> None:
    with pool_of() as pool:
        start = time.monotonic()
        answer = assert_between_two_good_ones(pool, command("close"))
        assert answer.end == "crashed"
        assert time.monotonic() - start < PATIENCE_S / 2
        assert not alive(answer.pid)


@pytest.mark.parametrize("wish", ["twice", "twice=30", "forge", "forge=30", "forge=300"])
def test_with_a_probe_a_frame_too_many_is_found_out(wish: str) -> None:
    with pool_of(probe=PROBE) as pool:
        answer = assert_between_two_good_ones(pool, command(wish, id=2))
        assert answer.end == "forged"
        assert pool.stats()["forged"] == 1
        assert not alive(answer.pid)


@pytest.mark.parametrize("wish", ["twice", "forge"])
def test_without_a_probe_a_frame_too_many_is_never_the_next_answer_if_it_comes_at_once(
    wish: str,
) -> None:
    with pool_of() as pool:
        for _ in range(20):
            assert_between_two_good_ones(pool, command(wish, id=2))
        assert pool.stats()["unsolicited"] == 20


def test_lines_before_an_answer_belong_to_it() -> None:
    with pool_of(probe=PROBE) as pool:
        blank = assert_between_two_good_ones(pool, command("blank", id=2))
        assert_answers(blank, 2)
        stray = assert_between_two_good_ones(pool, command("garbage", id=2))
        assert stray.end == "answer"
        assert stray.raw.startswith(b"a stray line\n{")
        with pytest.raises(ValueError, match=r"\d+"):
            stray.json()


def test_an_answer_that_comes_a_byte_at_a_time() -> None:
    with pool_of(probe=PROBE) as pool:
        (answer,) = ask(pool, command("split", id=1, messages=3))
        assert_answers(answer, 1)
        assert len(answer.json()["messages"]) == 3


@pytest.mark.parametrize("wish", ["balloon", "child_balloon"])
def test_a_memory_balloon_is_pricked(wish: str) -> None:
    with pool_of(memory_bytes=48 * MIB) as pool:
        answer = assert_between_two_good_ones(pool, command("hang", **{wish: 96}))
        assert answer.end == "memory"
        assert not alive(answer.pid)
        if wish == "child_balloon":
            assert eventually(lambda: not alive(child_of(answer)), 5)
        assert pool.stats()["killed_memory"] == 1


def test_a_worker_has_no_open_file_of_ours() -> None:
    with Path(os.devnull).open() as file, pool_of(workers=3) as pool:
        os.set_inheritable(file.fileno(), False)
        for answer in ask(pool, *(command("fds", id=i) for i in range(12))):
            assert answer.json()["fds"] == [0, 1, 2]


@pytest.mark.parametrize("program", ["/nowhere/repl", str(ROOT / "pyproject.toml")])
def test_a_program_that_cannot_be_executed_ends_every_command_as_unavailable(program: str) -> None:
    with Pool([program], workers=2, max_restarts=2) as pool:
        answers = ask(pool, *(command(id=i) for i in range(5)))
        assert [answer.end for answer in answers] == ["unavailable"] * 5
        assert program.encode() in answers[0].stderr


def test_a_worker_that_fails_at_its_start_is_tried_again(tmp_path: Path) -> None:
    fault = tmp_path / "fault"
    fault.touch()
    with pool_of("--fail-while", str(fault), max_restarts=50) as pool:
        tickets = pool.submit([command(id=0)], header=b"import X")
        assert eventually(lambda: pool.stats()["restarts"] >= 2)
        fault.unlink()
        answer = pool.wait(tickets[0], PATIENCE_S)
        assert answer is not None
        assert_answers(answer, 0)


def test_when_no_pipe_can_be_made_commands_end_as_unavailable_and_later_ones_work() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pool_of(max_restarts=2) as pool:
        assert_answers(ask(pool, command(id=1))[0], 1)
        (pid,) = pool.pids()
        highest = max(int(entry) for entry in os.listdir("/proc/self/fd"))
        spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]  # holes among the numbers
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(highest, *spare), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.open(os.devnull, os.O_RDONLY))
            (killed,) = ask(pool, command("die_before"))
            (answer,) = ask(pool, command(id=2))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for file in spare:
                os.close(file)
        assert killed.end == "crashed"
        assert answer.end == "unavailable"
        assert_answers(ask(pool, command(id=3))[0], 3)
        assert pool.pids() != [pid]


# Root is above RLIMIT_NPROC, so the process becomes nobody once its pool has begun.
_NO_FORK = """
import os, resource, sys
from fdfast._replio import Pool
program, word, good = sys.argv[1], sys.argv[2].encode(), sys.argv[3].encode()
pool = Pool([program], max_restarts=2)
ends = []
def ask(text):
    answer = pool.wait(pool.submit([text], unique=True)[0], 60.0)
    ends.append(answer.end)
ask(good)
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
before = resource.getrlimit(resource.RLIMIT_NPROC)
resource.setrlimit(resource.RLIMIT_NPROC, (1, before[1]))
ask(word)
ask(good)
resource.setrlimit(resource.RLIMIT_NPROC, before)
ask(good)
pool.close()
print(*ends)
"""


def test_when_no_process_can_be_made_commands_end_as_unavailable_and_later_ones_work() -> None:
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is the user's alone
        Path(folder).chmod(0o755)
        program = shutil.copy(fake_repl(), folder)
        arguments = [program, command("die_before").decode(), command(id=1).decode()]
        done = subprocess.run(
            [sys.executable, "-c", _NO_FORK, *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert done.stdout.split() == ["answer", "crashed", "unavailable", "answer"], done.stderr


def test_a_pickle_on_a_full_disk_ends_that_command_alone(tmp_path: Path) -> None:
    def pickle(path: Path | str) -> bytes:
        return json.dumps({"pickleTo": str(path), "env": 0}).encode()

    with pool_of() as pool:
        ask(pool, command())
        answer = assert_between_two_good_ones(pool, pickle("/dev/full"))
        assert (answer.end, answer.status) == ("crashed", 1)
        assert b"No space left on device" in answer.stderr
        ask(pool, command())
        good = assert_between_two_good_ones(pool, pickle(tmp_path / "state"))
        assert good.end == "answer"
        assert (tmp_path / "state").stat().st_size > 0
