"""A chain's commands run on one worker, one after another, each in the environment of the last."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

from fdfast._replio import Answer, Pool
from fdfast.errors import InputError

# Answers with the query, its own process and a fresh env; a query says how else to behave.
_WORKER = """
import json, os, sys, time
number = 0
for line in sys.stdin:
    if not line.strip():
        continue
    query = json.loads(line)
    time.sleep(query.get("sleep", 0))
    if "die" in query:
        os.kill(os.getpid(), query["die"])
    number += 1
    answer = {"env": number, "query": query, "pid": os.getpid()}
    if "without" in query:
        del answer["env"]
    for copy in range(query.get("times", 1)):
        print(json.dumps(answer) + "\\n", flush=True)
"""
_PROBE = b'{"path": "/%s"}'


@pytest.fixture(params=[b"", _PROBE], ids=["plain", "probed"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool([sys.executable, "-c", _WORKER], workers=3, probe=request.param) as pool:
        yield pool


def encoded(*queries: dict[str, object]) -> list[bytes]:
    return [json.dumps(query).encode() for query in queries]


def answers(pool: Pool, tickets: Sequence[int]) -> list[Answer]:
    found = [pool.wait(ticket, 20) for ticket in tickets]
    assert None not in found
    return [answer for answer in found if answer is not None]


def ends(pool: Pool, tickets: Sequence[int]) -> list[str]:
    return [answer.end for answer in answers(pool, tickets)]


def test_each_command_runs_in_the_environment_of_the_one_before(pool: Pool) -> None:
    chains = [
        pool.submit(encoded({"a": i}, {"b": i}, {"c": i}), header=b"h" * (i % 2), chain=True)
        for i in range(12)
    ]
    lone = pool.submit(encoded(*({"x": i} for i in range(20))))
    for number, tickets in enumerate(chains):
        first, second, third = (answer.json() for answer in answers(pool, tickets))
        assert first["pid"] == second["pid"] == third["pid"]
        assert ("env" in first["query"]) == bool(number % 2)
        assert (second["query"], third["query"]) == (
            {"env": first["env"], "b": number},
            {"env": second["env"], "c": number},
        )
        # Nothing of others came between.
        step = 2 if pool.stats()["forged"] or third["env"] - second["env"] > 1 else 1
        assert third["env"] - second["env"] == second["env"] - first["env"] == step
    assert ends(pool, lone) == ["answer"] * 20


def test_after_an_answer_without_an_env_the_rest_is_not_run(pool: Pool) -> None:
    tickets = pool.submit(encoded({"a": 1}, {"without": 1}, {"b": 1}, {"c": 1}), chain=True)
    assert ends(pool, tickets) == ["answer", "answer", "header", "header"]
    stats = pool.stats()
    assert (stats["queued"], stats["running"], stats["held_bytes"]) == (0, 0, 0)


def test_a_chain_whose_worker_dies_is_not_carried_on_by_another(pool: Pool) -> None:
    tickets = pool.submit(encoded({"a": 1}, {"die": signal.SIGSEGV}, {"b": 1}), chain=True)
    found = answers(pool, tickets)
    assert [answer.end for answer in found] == ["answer", "crashed", "header"]
    assert found[1].status == -signal.SIGSEGV
    tickets = pool.submit(encoded({"a": 1}, {"sleep": 30}, {"b": 1}), chain=True, timeout_s=0.3)
    assert ends(pool, tickets) == ["answer", "timeout", "header"]
    assert ends(pool, pool.submit(encoded({"a": 1}, {"b": 1}), chain=True)) == ["answer"] * 2


def test_a_worker_killed_between_two_commands_of_a_chain_ends_it(pool: Pool) -> None:
    tickets = pool.submit(encoded({"a": 1}, {"sleep": 1}), chain=True)
    first = pool.wait(tickets[0], 20)
    assert first is not None
    os.kill(first.json()["pid"], signal.SIGKILL)
    assert ends(pool, tickets[1:]) == ["crashed"]


def test_an_answer_too_many_ends_a_probed_chain_as_forged() -> None:
    with Pool([sys.executable, "-c", _WORKER], probe=_PROBE) as pool:
        tickets = pool.submit(encoded({"a": 1}, {"times": 2}, {"b": 1}), chain=True)
        assert ends(pool, tickets) == ["answer", "forged", "header"]


def test_a_chain_can_be_cancelled_at_every_place(pool: Pool) -> None:
    queries = encoded({"sleep": 0.2}, {"sleep": 0.2}, {"a": 1})
    for cancelled in ([0], [1], [2], [0, 1, 2], [1, 2]):
        for wait in (0.0, 0.3):
            tickets = pool.submit(queries, chain=True)
            time.sleep(wait)
            pool.cancel([tickets[place] for place in cancelled])
            found = ends(pool, tickets)
            assert set(found) <= {"answer", "cancelled"}
            if wait == 0:
                first = cancelled[0]
                assert found[first:] == ["cancelled"] * (3 - first)
                assert found[:first] == ["answer"] * first
    until = time.monotonic() + 10
    while pool.stats()["running"] and time.monotonic() < until:  # killed, and not yet reaped
        time.sleep(0.01)
    stats = pool.stats()
    assert (stats["queued"], stats["running"], stats["held_bytes"]) == (0, 0, 0)
    assert stats["submitted"] == stats["answered"]


def test_closing_cancels_what_is_left_of_a_chain() -> None:
    pool = Pool([sys.executable, "-c", _WORKER])
    tickets = pool.submit(encoded({"sleep": 30}, {"a": 1}, {"b": 1}), chain=True)
    queued = pool.submit(encoded({"a": 1}, {"b": 1}), chain=True)
    time.sleep(0.2)
    pool.close()
    assert ends(pool, [*tickets, *queued]) == ["cancelled"] * 5


def test_a_worker_is_recycled_between_chains_and_not_within() -> None:
    with Pool([sys.executable, "-c", _WORKER], recycle_after=1) as pool:
        chains = [pool.submit(encoded({"a": 1}, {"b": 1}), chain=True) for _ in range(3)]
        pids = [[answer.json()["pid"] for answer in answers(pool, tickets)] for tickets in chains]
        assert all(first == second for first, second in pids)
        assert len({first for first, _ in pids}) == 3


def test_what_is_no_json_object_cannot_follow_in_a_chain() -> None:
    with Pool([sys.executable, "-c", _WORKER]) as pool:
        with pytest.raises(InputError, match="command 1 must be the text of a JSON object"):
            pool.submit([b"[]", b"[]"], chain=True)
        assert pool.submit([], chain=True) == []
    with (
        Pool(["cat"], mode="once") as pool,
        pytest.raises(InputError, match='chain need mode "repl"'),
    ):
        pool.submit([b"a"], chain=True)
