"""Workers for the pool's tests: one in Python, with deeds that commands name.

`cat` is the quickest worker there is: it answers each command with itself.
"""

import sys
from typing import Any

from fdfast._replio import Answer, Pool
from tests.replio_pools import PATIENCE_S

# Answers what it was sent, after the deed that the command names.
WORKER = """
import os, signal, sys, time
kept, envs = [], 0
if sys.argv[1:] == ["late"]:
    time.sleep(0.05)
    print("noise\\nready", flush=True)
text = ""
for line in sys.stdin:
    if line != "\\n":
        text += line
        continue
    word, _, rest = text.strip().partition(" ")
    if word == "sleep": time.sleep(float(rest))
    if word == "hang": signal.pause()
    if word == "die": os._exit(int(rest))
    if word == "touch": kept.append(b"x" * (int(rest) << 20))
    if word == "fork":  # the grandchild says who it is
        if os.fork() == 0:
            text = f"child {os.getpid()}"
            if rest == "away": os.setsid()
            kept.append(b"x" * (50 << 20))
            print(text + "\\n", flush=True)
            time.sleep(60)
            os._exit(0)
        signal.pause()
    answer = text.strip()
    if answer.startswith('{"cmd"') and "import" in answer:
        answer, envs = '{"env": %d}' % envs, envs + 1
    if "nonsense" in answer: answer = '{"message": "no"}'
    print(answer + "\\n", flush=True)
    text = ""
"""


def script(*arguments: str, **options: Any) -> Pool:
    return Pool([sys.executable, "-SEc", WORKER, *arguments], **options)


def wait(pool: Pool, ticket: int) -> Answer:
    answer = pool.wait(ticket, PATIENCE_S)
    assert answer is not None
    return answer


def ask(pool: Pool, command: bytes, **options: Any) -> Answer:
    return wait(pool, pool.submit([command], **options)[0])
