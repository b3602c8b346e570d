"""Thousands of commands with faults at random: each ends as its fault has it, exactly once."""

import json
import random

import pytest

from fdfast._replio import Answer
from tests.fake_repl import command
from tests.replio_pools import MIB, PATIENCE_S, PROBE, pool_of

# Fault -> its wishes, how it ends with a probe, the command's own deadline (None: the pool's).
STORM: dict[str, tuple[str, str, float | None]] = {
    "killed before": ("die_before", "crashed", None),
    "killed during": ("die_during", "crashed", None),
    "killed after": ("die_after", "crashed", None),
    "SIGTERM ignored": ("ignore_sigterm hang", "timeout", 0.1),
    "grandchild": ("grandchild=30 die_before", "crashed", None),
    "stderr": ("stderr=1048576", "answer", None),
    "large": ("size=1048576", "answer", None),
    "cut": ("cut size=1000", "no json", None),
    "no UTF-8": ("no_utf8", "no json", None),
    "deep": ("deep=100000", "no json", None),
    "never": ("hang", "timeout", 0.1),
    "twice": ("twice=1", "forged", None),
    "forged": ("forge=1", "forged", None),
    "balloon": ("balloon=48 hang", "memory", None),
    "full disk": ("", "full disk", None),
}
SHARE = 0.05  # of each


def storm_command(fault: str, number: int) -> bytes:
    if fault == "full disk":
        return json.dumps({"pickleTo": "/dev/full", "env": 0, "number": number}).encode()
    return command(*STORM.get(fault, ("",))[0].split(), id=number)


def outcome(answer: Answer, number: int) -> str:
    """In the words of the table; an answer to another command is none of them."""
    if answer.end == "crashed" and answer.status == 1 and b"No space left" in answer.stderr:
        return "full disk"
    if answer.end != "answer":
        return answer.end
    try:
        found = answer.json()["id"]
    except ValueError:
        return "no json" if answer.raw.startswith(b'{"id": %d,' % number) else "another's answer"
    return "answer" if found == number else "another's answer"


@pytest.mark.parametrize(
    "num_commands", [1000, pytest.param(10_000, marks=pytest.mark.slow)], ids=str
)
def test_a_storm_of_faults_gives_every_command_its_own_end_once(num_commands: int) -> None:
    rng = random.Random(num_commands)
    names = [*STORM, "none"]
    weights = [SHARE] * len(STORM) + [1 - SHARE * len(STORM)]
    faults = rng.choices(names, weights, k=num_commands)
    options = {"workers": 4, "probe": PROBE, "memory_bytes": 32 * MIB}
    with pool_of(**options) as pool:
        numbers = {}
        for number, fault in enumerate(faults):
            deadline = STORM[fault][2] if fault in STORM else None
            (ticket,) = pool.submit(
                [storm_command(fault, number)], header=b"import X", timeout_s=deadline
            )
            numbers[ticket] = number
        wrong = []
        for _ in range(num_commands):
            answer = pool.next(PATIENCE_S)
            assert answer is not None, pool.stats()
            number = numbers.pop(answer.ticket)  # a KeyError: answered twice
            expected = STORM.get(faults[number], ("", "answer"))[1]
            seen = outcome(answer, number)
            if seen != expected:
                wrong.append(f"{number} {faults[number]}: {seen}, not {expected}")
        assert not wrong, f"{len(wrong)} of {num_commands}: {wrong[:10]}"
        assert not numbers
        assert len(pool.pids()) <= 4
