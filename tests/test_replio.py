"""The pool of REPL workers from Python: what it promises of order, sharing, limits and ends.

What workers may do wrong is in test_replio_faults.py, life beside signals and forks in
test_replio_process.py.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fdfast._replio import Pool
from fdfast.errors import InputError
from tests.replio_pools import PATIENCE_S, alive, eventually
from tests.replio_workers import ask, script, wait

# ---- Tickets and answers.


@pytest.mark.parametrize("depth", [1, 5])
def test_one_worker_answers_in_order_with_the_bytes_as_they_are(depth: int) -> None:
    commands = [
        b"a",
        b"x\ny",
        bytes(range(11, 256)),
        b"z" * 300_000,
        *(b"%d" % i for i in range(200)),
    ]
    with Pool(["cat"], depth=depth) as pool:
        tickets = pool.submit(commands)
        assert tickets == list(range(len(commands)))
        for ticket, command in zip(tickets, commands, strict=True):
            answer = pool.next(PATIENCE_S)
            assert answer is not None
            assert (answer.ticket, answer.end, answer.raw) == (ticket, "answer", command)
            assert bytes(memoryview(answer)) == command
            assert len(answer) == len(command)
            assert (answer.status, answer.stderr, answer.shared) == (None, b"", False)
            assert answer.pid in pool.pids()
            assert answer.seconds > 0 or depth > 1
            assert answer.queued_s >= 0
        assert pool.next() is None
        assert pool.submit([]) == []


def test_an_answer_is_waited_for_by_name_while_others_are_fetched() -> None:
    with script(workers=2) as pool:
        slow, *quick = pool.submit([b"sleep 0.2", b"a", b"b"])
        assert pool.wait(slow, 0.01) is None
        assert [answer.raw for answer in (pool.next(), pool.next()) if answer] == [b"a", b"b"]
        assert wait(pool, slow).raw == b"sleep 0.2"
        assert pool.wait(slow) is None  # it has been fetched
        assert pool.wait(quick[0]) is None
        for ticket in (-1, 3):
            with pytest.raises(InputError, match=rf"wait: ticket must be one.*got {ticket}$"):
                pool.wait(ticket)


def test_threads_that_wait_by_name_get_their_own_whoever_else_fetches() -> None:
    with Pool(["cat"], workers=2) as pool:
        seen: dict[int, bytes] = {}

        def own(numbers: range) -> None:
            for number in numbers:
                answer = wait(pool, pool.submit([b"own %d" % number])[0])
                seen[number] = answer.raw

        threads = [
            threading.Thread(target=own, args=(range(i * 100, i * 100 + 100),)) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        others = [pool.next(PATIENCE_S) for _ in pool.submit([b"any %d" % i for i in range(100)])]
        for thread in threads:
            thread.join()
        assert seen == {number: b"own %d" % number for number in range(400)}
        fetched = sorted(answer.raw for answer in others if answer)
        assert fetched == sorted(b"any %d" % i for i in range(100))


def test_json_is_what_json_loads_gives() -> None:
    values: list[Any] = [
        {"messages": [{"pos": {"line": 1, "column": 0}, "data": "∀ x ∈ β, \U0001d538"}], "env": 3},
        [
            None,
            True,
            False,
            -1,
            2**63,
            10**40,
            -(10**40),
            0.1,
            -2.5e-300,
            "",
            '\x00\x1f"\\/',
            {},
            [],
        ],
        {"a": 1, "b": {"a": 2, "b": 3}, "": 4},
    ]
    with Pool(["cat"]) as pool:
        for value in values:
            for ascii_only in (True, False):
                answer = ask(pool, json.dumps(value, ensure_ascii=ascii_only).encode())
                assert answer.json() == value
                assert answer.json() is answer.json()
        assert ask(pool, b'{"a": 1, "a": 1e999}').json() == {"a": float("inf")}
        deepest = b"[" * 512 + b"]" * 512
        assert ask(pool, deepest).json() == json.loads(deepest)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"true false", "at byte 5 of 10"),
        (b'{"a": oops}', "at byte 6 of 11.*oops"),
        (b'"\xff"', r"at byte 1 of 3.*\\xff"),
        (b"[" * 513 + b"]" * 513, "deeper than 512 at byte 512 of 1026"),
        (b"[" * 5_000_000, "deeper than 512 at byte 512 of 5000000"),
        (b"NaN", "at byte 0 of 3"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place_and_an_excerpt(text: bytes, said: str) -> None:
    with Pool(["cat"]) as pool:
        answer = ask(pool, text)
        with pytest.raises(ValueError, match=said) as caught:
            answer.json()
        assert "\n" not in str(caught.value)
        assert answer.raw == text


def test_a_process_for_each_command_gives_all_its_output_and_its_status() -> None:
    code = "import sys; text = sys.stdin.read(); print(text[::-1], end=''); sys.exit(len(text))"
    with Pool([sys.executable, "-SEc", code], mode="once", workers=2) as pool:
        tickets = pool.submit([b"abc\n\n", b"", b"x"])
        answers = [wait(pool, ticket) for ticket in tickets]
        assert [(a.raw, a.end, a.status) for a in answers] == [
            (b"\n\ncba", "answer", 5),
            (b"", "answer", 0),
            (b"x", "answer", 1),
        ]
        assert len({answer.pid for answer in answers}) == 3
    with Pool(["/bin/sh"], mode="once") as pool:
        assert (ask(pool, b"echo a; kill -9 $$").end, ask(pool, b"echo b >&2").stderr) == (
            "crashed",
            b"b\n",
        )


def test_the_environment_and_the_folder_are_as_given(tmp_path: Path) -> None:
    with Pool(["/bin/sh"], mode="once", env={"A": "ü"}, cwd=str(tmp_path)) as pool:
        assert ask(pool, b"echo $A $PWD $HOME").raw == f"ü {tmp_path}\n".encode()
    os.environ["FDFAST_TEST_HERE"] = "yes"
    try:
        pool = Pool(["/bin/sh"], mode="once")
    finally:
        del os.environ["FDFAST_TEST_HERE"]
    with pool:
        assert ask(pool, b"echo $FDFAST_TEST_HERE").raw == b"yes\n"


# ---- Headers, sharing, cancelling, back-pressure.


def test_a_header_is_sent_once_to_each_worker_and_its_environment_put_into_commands() -> None:
    with script() as pool:
        for header, env in ((b"import A", 0), (b"import B\nopen C", 1), (b"import A", 0)):
            for number in range(3):
                command = b'{"a": %d}' % number
                answer = ask(pool, command, header=header)
                assert answer.json() == {"env": env, "a": number}
        assert pool.stats()["headers"] == 2
        bad = ask(pool, b"{}", header=b"nonsense")
        assert (bad.end, bad.raw) == ("header", b'{"message": "no"}')
        with pytest.raises(InputError, match="command 1 must be the text of a JSON object"):
            pool.submit([b"{}", b"[]"], header=b"import A")
        assert ask(pool, b"plain").raw == b"plain"


def test_a_worker_that_holds_the_header_is_preferred() -> None:
    with script(workers=2) as pool:
        for header in (b"import A", b"import B") * 10:
            ask(pool, b"{}", header=header)
        assert pool.stats()["headers"] == 2
        both = pool.submit([b'{"sleep": 1}'] * 1, header=b"import A")
        assert wait(pool, both[0]).raw == b'{"env": 0, "sleep": 1}'


def test_equal_commands_in_flight_share_an_answer_unless_unique() -> None:
    with script() as pool:
        pool.submit([b"sleep 0.1"])
        tickets = pool.submit([b"same"] * 5 + [b"other"])
        answers = [wait(pool, ticket) for ticket in tickets]
        assert [answer.shared for answer in answers] == [False, True, True, True, True, False]
        assert pool.stats()["shared"] == 4
        lone = [wait(pool, ticket) for ticket in pool.submit([b"same"] * 3, unique=True)]
        assert [answer.shared for answer in lone] == [False] * 3


def test_recent_answers_are_kept_as_far_as_the_cache_reaches() -> None:
    with Pool(["cat"], cache_bytes=10_000) as pool:
        assert [ask(pool, b"a").shared for _ in range(3)] == [False, True, True]
        assert not ask(pool, b"a", unique=True).shared
        assert not ask(pool, b"a", timeout_s=50).shared
        ask(pool, b"b" * 9_000)  # with its command it is over the limit itself
        assert not ask(pool, b"a").shared
    with script(cache_bytes=10_000) as pool:
        assert [ask(pool, b"die 3").shared for _ in range(2)] == [False, False]


def test_cancelled_tickets_end_at_once_and_free_their_worker() -> None:
    with script() as pool:
        running, twin, queued, last = pool.submit([b"hang", b"hang", b"x", b"y"])
        assert eventually(lambda: pool.stats()["running"] == 1)
        assert pool.cancel([queued, running]) == 2
        assert [wait(pool, ticket).end for ticket in (queued, running)] == ["cancelled"] * 2
        assert pool.stats()["running"] == 1  # for its twin
        assert pool.cancel([twin, twin]) == 1
        assert wait(pool, last).raw == b"y"
        assert pool.cancel([last, 99]) == 0
        assert pool.stats()["killed_cancelled"] == 1


def test_submit_waits_while_the_queue_is_full() -> None:
    with script(queue_bytes=1000) as pool:
        pool.submit([b"sleep 0.3"])
        pool.submit([b"a" * 900])
        with pytest.raises(BlockingIOError, match="queue_bytes"):
            pool.submit([b"b" * 900], block=False)
        began = time.monotonic()
        fetching = threading.Thread(target=lambda: [pool.next(), pool.next()])
        fetching.start()
        [ticket] = pool.submit([b"b" * 900])  # once the answers before are fetched
        assert time.monotonic() - began > 0.15
        fetching.join()
        assert wait(pool, ticket).raw == b"b" * 900
        assert pool.stats()["held_bytes"] == 0


# ---- Limits.


def test_a_late_command_is_killed_and_the_next_has_a_new_worker() -> None:
    with script(timeout_s=0.2) as pool:
        pid = ask(pool, b"a", timeout_s=PATIENCE_S).pid
        late = ask(pool, b"hang")
        assert (late.end, late.status, late.pid) == ("timeout", -signal.SIGKILL, pid)
        assert 0.2 <= late.seconds < 10
        assert not alive(pid)
        after = ask(pool, b"b", timeout_s=PATIENCE_S)
        assert after.raw == b"b"
        assert after.pid != pid
        assert pool.stats()["killed_timeout"] == 1


def test_the_memory_of_all_descendants_counts() -> None:
    with script(memory_bytes=60 << 20) as pool:
        assert ask(pool, b"touch 10").end == "answer"
        fat = ask(pool, b"touch 100")
        assert fat.end in ("answer", "memory")  # it may be quicker than the look
        found = ask(pool, b"fork away")
        child = int(found.raw.split()[1]) if found.end == "answer" else 0
        assert child == 0 or eventually(
            lambda: not alive(child) or ask(pool, b"hang").end == "memory"
        )
        assert child == 0 or eventually(lambda: not alive(child))
        assert ask(pool, b"fine").raw == b"fine"
        assert pool.stats()["killed_memory"] >= 1


def test_workers_are_replaced_after_so_many_commands_or_so_much_memory() -> None:
    with script(recycle_after=3) as pool:
        pids = [ask(pool, b"%d" % i).pid for i in range(7)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    with script(recycle_bytes=60 << 20, poll_s=0.001) as pool:
        small, big = ask(pool, b"touch 1"), ask(pool, b"touch 80")
        time.sleep(0.01)
        assert small.pid == big.pid != ask(pool, b"touch 1").pid
        assert pool.stats()["recycled"] == 1


def test_a_worker_takes_commands_after_its_ready_line() -> None:
    with script("late", ready=b"ready", workers=2) as pool:
        tickets = pool.submit([b"%d" % i for i in range(5)])
        assert [wait(pool, ticket).raw for ticket in tickets] == [b"%d" % i for i in range(5)]
    with script(ready=b"ready", start_timeout_s=0.1, max_restarts=2) as pool:
        answer = ask(pool, b"x")
        assert answer.end == "unavailable"
        assert b"no `ready` line within 0.1" in answer.stderr


def test_starts_that_fail_are_tried_again_more_and_more_slowly() -> None:
    with Pool(["false"], max_restarts=4) as pool:
        began = time.monotonic()
        answers = [wait(pool, ticket) for ticket in pool.submit([b"a", b"b"])]
        assert time.monotonic() - began >= 0.05 + 0.1 + 0.2
        assert [answer.end for answer in answers] == ["unavailable"] * 2
        assert b"the worker ended before it took a command: exit status 1" in answers[0].stderr
        assert pool.stats()["failed_starts"] == 4
    for argv, cwd in ((["/nonexistent/x"], ""), (["cat"], "/nonexistent")):
        with Pool(argv, cwd=cwd, max_restarts=1) as pool:
            assert re.search(
                rb"(execve|chdir) /nonexistent.*: No such file", ask(pool, b"a").stderr
            )


def test_a_probe_tells_a_forged_answer() -> None:
    with Pool(["/bin/sh"], probe=b"echo %s; echo") as pool:
        good = ask(pool, b"echo fine; echo")
        assert (good.end, good.raw) == ("answer", b"fine")
        forged = ask(pool, b"echo fine; echo; echo more; echo")
        assert (forged.end, forged.raw, forged.status) == ("forged", b"fine", -signal.SIGKILL)
        assert ask(pool, b"echo again; echo").end == "answer"


def test_bad_arguments_are_refused_in_one_line() -> None:
    bad: list[dict[str, Any]] = [
        {"argv": []},
        {"argv": [""]},
        {"argv": ["a\0b"]},
        {"workers": 0},
        {"depth": 0},
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"start_timeout_s": -1.0},
        {"memory_bytes": -1},
        {"poll_s": 0.0},
        {"answer_bytes": 0},
        {"queue_bytes": 0},
        {"max_restarts": 0},
        {"mode": "twice"},
        {"mode": "once", "probe": b"%s"},
        {"mode": "once", "ready": b"x"},
        {"probe": b"none"},
        {"probe": b"%s\n\n"},
        {"probe": b"%s", "depth": 2},
        {"ready": b"a\nb"},
    ]
    for options in bad:
        with pytest.raises(InputError) as caught:
            Pool(**{"argv": ["cat"], **options})
        assert re.fullmatch(r"Pool: [^\n]+", str(caught.value)), options
    with Pool(["cat"]) as pool:
        for command in (b"", b"a\n\nb", b"\na", b"a\n"):
            with pytest.raises(InputError, match=r"^submit: command 1 [^\n]*$"):
                pool.submit([b"fine", command])
        for wrong in (b"bytes", ["text"], 7):
            with pytest.raises(TypeError, match="submit: command"):
                pool.submit(wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="timeout_s must be positive"):
            pool.submit([b"a"], timeout_s=0)
        assert pool.next() is None
    with Pool(["cat"], mode="once") as pool, pytest.raises(InputError, match="header and chain"):
        pool.submit([b"a"], header=b"b")
