"""Lean's verdicts on trajectories, asked for while others are still sampled."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from fdfast.data.problems import Problem, fenced, proof_text, spoken
from fdfast.interrupts import result_of
from fdfast.lean import LeanPool, Verdict
from fdfast.lean.submission import Submission, read_submission
from fdfast.rollout.trajectory import ToolSource, Trajectory

# Of one attempt; each may take Lean as long as its limit allows.
MAX_SUBMISSIONS = 4


def submissions(problem: Problem, answer: str, files: Mapping[str, str]) -> list[Submission]:
    """What an answer submits for proofs, in the order in which they are tried.

    The files that were written come first: who has tools proves by a file. The last turn counts as
    a Lean file too if it has the theorem with lemmas above it, else as the proof alone.

    Args:
        problem: a theorem.
        answer: the last turn.
        files: path -> text.
    """
    theorem = problem.theorem
    assert theorem is not None
    found, answer = [], spoken(answer)
    for text in files.values():
        submission = read_submission(text, theorem.formal_statement, theorem.header)
        if submission is not None:
            found.append(submission)
    if not found or "```" in answer:
        block = fenced(answer)
        whole = read_submission(block, theorem.formal_statement, theorem.header)
        found.append(whole or Submission(proof_text(answer)))
    return list(dict.fromkeys(found))[:MAX_SUBMISSIONS]


class Judge:
    """Checks what trajectories submit, in threads of its own; a context manager.

    Args:
        lean: the pool; None gives no verdicts.
        problems: of the trajectories, by number.
        toolboxes: with the files that they wrote.
    """

    def __init__(
        self, lean: LeanPool | None, problems: Sequence[Problem], toolboxes: ToolSource | None
    ) -> None:
        self.lean, self.problems, self.toolboxes = lean, problems, toolboxes
        # The pool decides how many are checked at once.
        self.threads = ThreadPoolExecutor(16, thread_name_prefix="judge")
        self.verdicts: dict[int, Future[tuple[Verdict, Submission]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error nobody waits for a check that still runs; whoever holds Lean ends it.
        self.threads.shutdown(wait=kind is None, cancel_futures=True)

    def submit(self, number: int, trajectory: Trajectory) -> None:
        """A trajectory has ended."""
        if self.lean is not None and self.problems[number].theorem is not None:
            files = {} if self.toolboxes is None else self.toolboxes.close(number)
            submitted = submissions(self.problems[number], trajectory.text, files)
            self.verdicts[number] = self.threads.submit(self._check, number, submitted)

    def judged(self, number: int, trajectory: Trajectory) -> Trajectory:
        """With Lean's verdict, waited for; as it was where Lean was not asked.

        Raises:
            MachineError: Lean cannot be run here.
        """
        future = self.verdicts.get(number)
        if future is None:
            return trajectory
        verdict, (proof, context) = result_of(future)
        proof = f"{context}\n\n{proof}" if context else proof
        return dataclasses.replace(trajectory, verdict=verdict, proof=proof)

    def _check(self, number: int, submitted: list[Submission]) -> tuple[Verdict, Submission]:
        """The first that is proved, else the first."""
        theorem = self.problems[number].theorem
        assert theorem is not None
        assert self.lean is not None
        judged = []
        for submission in submitted:
            proof, context = submission
            verdict = self.lean.check(theorem.formal_statement, proof, theorem.header, context)
            judged.append((verdict, submission))
            if verdict.proved:
                return judged[-1]
        return judged[0]
