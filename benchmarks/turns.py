"""What benchmarks of workers share: cases, turns, each contender in a fresh process."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from benchmarks.render import HERE


def parametrize(
    metafunc: pytest.Metafunc,
    all_cases: Callable[..., Sequence[Any]],
    contenders: Callable[[Any], Sequence[str]],
    num_turns: int,
) -> None:
    """Case by case, turn by turn, all contenders; on the CPU alone so far."""
    quick = metafunc.config.getoption("quick")
    cases = all_cases(quick=quick) if metafunc.config.getoption("device") == "cpu" else []
    items = [
        (case, turn, contender)
        for case in cases
        for turn in range(1 if quick else num_turns)
        for contender in contenders(case)
    ]
    ids = [f"{case.name}-{turn}-{contender}" for case, turn, contender in items]
    metafunc.parametrize(("case", "turn", "contender"), items, ids=ids)


def without_time(benchmark: Any, note: str) -> None:
    """A row that says why it has no time."""
    benchmark.extra_info["note"] = note
    benchmark.pedantic(lambda: None, rounds=1)


def run_worker(
    benchmark: Any, command: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """What the worker's last line says.

    Args:
        benchmark: the fixture.
        command: ends with the case, the contender, the turn and whether it is a quick run.
        environment: over this process's.
    """
    done = benchmark.pedantic(
        lambda: subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            cwd=HERE.parent,
            env=os.environ | environment,
        ),
        rounds=1,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
