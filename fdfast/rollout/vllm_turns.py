"""What both engines with vLLM share: how a turn is asked for, and when trajectories take turns."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fdfast.errors import InputError
from fdfast.interrupts import go_on
from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.turns import Draft, Turns

# vLLM raises what lies between 0 and this, without a word in its answer.
_LEAST_TEMPERATURE = 0.01


class Sampled(NamedTuple):
    """A turn: its ids, their log-probs, and whether an end token or a stop string ended it."""

    ids: list[int]
    logprobs: list[float]
    stopped: bool


class Sampler(Protocol):
    """Samples turns, many at once."""

    def start(self, draft: Draft, params: dict[str, Any]) -> None:
        """Begin the draft's next turn.

        Args:
            draft: what it follows.
            params: of vLLM's SamplingParams.
        """
        ...

    def num_running(self) -> int:
        """Turns that were begun and not yet returned."""
        ...

    def finished(self, turns: Turns) -> list[tuple[Draft, Sampled]]:
        """Sample on for a while; the turns that have ended. Returns early when a tool answers."""
        ...


def check_prompts(prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
    """Each prompt leaves room for a token at least.

    Args:
        prompts: token ids.
        max_model_len: vLLM's limit of tokens of prompt and trajectory.

    Raises:
        InputError: one is empty, or leaves none.
    """
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"generate: prompt {number} is empty; it must have a token at least")
        if len(prompt) >= max_model_len:
            raise InputError(
                f"generate: prompt {number} has {len(prompt)} tokens; with max_model_len = "
                f"{max_model_len} at most {max_model_len - 1} leave room to write; raise "
                "max_model_len or shorten the prompt"
            )


def logprobs_mode_for(options: SamplingOptions) -> str:
    """The `logprobs_mode` of vLLM that gives log-probs as `Trajectory` wants them, with the
    temperature and before top_k and top_p; "" if each does.

    vLLM knows them before both (raw_logprobs) or after both (processed_logprobs).

    Raises:
        InputError: none does.
    """
    if 0 < options.temperature < _LEAST_TEMPERATURE:
        raise InputError(
            f"vLLM samples at temperature {_LEAST_TEMPERATURE} at least, or greedily at 0; got "
            f"{options.temperature}"
        )
    tempered = options.temperature not in (0, 1)
    # Greedy takes the best token of all, whatever they cut: they are not sent.
    cut = options.temperature > 0 and (options.top_p < 1 or options.top_k > 0)
    if tempered and cut:
        raise InputError(
            f"vLLM can't give log-probs with temperature {options.temperature} but before top_p "
            f"{options.top_p} and top_k {options.top_k}; set temperature to 1, or top_p to 1 and "
            "top_k to 0, or take the hf engine"
        )
    return "processed_logprobs" if tempered else "raw_logprobs" if cut else ""


def check_logprobs_mode(options: SamplingOptions, mode: str) -> None:
    """vLLM's `logprobs_mode` does for these options.

    Raises:
        InputError: it does not.
    """
    wanted = logprobs_mode_for(options)
    if wanted not in ("", mode):
        raise InputError(
            f"vLLM runs with logprobs_mode {mode!r}, but temperature {options.temperature}, top_p "
            f"{options.top_p} and top_k {options.top_k} want {wanted!r}; start it with that, or "
            "set temperature to 1, top_p to 1 and top_k to 0"
        )


def turn_seed(seed: int, number: int, rounds: int) -> int:
    """The seed of a turn, 0 to 2**62 - 1, from the step's and the places of prompt and turn."""
    digest = hashlib.blake2b(f"{seed}:{number}:{rounds}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def sampling_params(
    options: SamplingOptions, end_ids: Sequence[int], *, seed: int, max_tokens: int
) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for one turn."""
    greedy = options.temperature == 0
    params: dict[str, Any] = {
        "temperature": float(options.temperature),
        "top_p": 1.0 if greedy else float(options.top_p),
        "top_k": 0 if greedy else options.top_k,
        "max_tokens": max_tokens,
        "seed": seed,
        "logprobs": 0,  # of the sampled token alone
        # What ends a turn is said in full, rather than by what vLLM reads in the model's folder.
        "ignore_eos": True,
        "stop_token_ids": list(end_ids),
        "detokenize": bool(options.stop_strings),
    }
    if options.stop_strings:
        params |= {"stop": list(options.stop_strings), "include_stop_str_in_output": True}
    return params


def run_turns(
    turns: Turns,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    seed: int,
    first: int = 0,
    max_running: int,
    max_model_len: int,
) -> list[Trajectory]:
    """One trajectory a prompt, in order; those that wait for tools hold nobody up.

    Args:
        turns: what lies between turns.
        prompts: see `check_prompts`.
        sampler: samples the turns.
        seed: of the step.
        first: see `Engine.generate`.
        max_running: turns sampled at once.
        max_model_len: tokens of prompt and trajectory; one that reaches it ends with "length".
    """
    queue = list(enumerate(prompts))[::-1]
    back: list[Draft] = []
    while queue or back or turns.waiting or sampler.num_running():
        go_on()
        # Whoever waits holds tools (folders, processes), so there is a limit to them.
        may_begin = bool(queue) and len(turns.waiting) < 4 * max_running
        idle = not (back or may_begin or sampler.num_running())
        back += turns.returned("one" if idle else "nobody")
        while (back or may_begin) and sampler.num_running() < max_running:
            draft = back.pop(0) if back else turns.begin(*queue.pop())
            may_begin = may_begin and bool(queue)
            room = max_model_len - len(draft.prompt_ids) - len(draft.ids)
            if room < 1:
                turns.cut_off(draft)
                continue
            params = sampling_params(
                turns.options,
                sorted(turns.end_ids),
                seed=turn_seed(seed, first + draft.number, draft.rounds),
                max_tokens=min(room, turns.tokens_left(draft)),
            )
            sampler.start(draft, params)
        if sampler.num_running():
            for draft, sampled in sampler.finished(turns):
                draft.add_sampled(sampled.ids, sampled.logprobs)
                turns.end_turn(draft, stopped=sampled.stopped)
    return turns.trajectories()
