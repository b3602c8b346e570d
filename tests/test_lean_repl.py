"""Every request of the REPL's protocol is one line, every answer is read or its fault named."""

import copy
import json
from collections.abc import Callable

import pytest

from fdfast.errors import InputError, MachineError
from fdfast.lean import repl

# The forms as the REPL's documentation shows them.
REQUESTS: list[tuple[repl.Request, dict[str, object]]] = [
    (repl.Command("import Mathlib\nopen Nat"), {"cmd": "import Mathlib\nopen Nat"}),
    (repl.Command("example : 1 = 1 := rfl", env=3), {"cmd": "example : 1 = 1 := rfl", "env": 3}),
    (
        repl.Command("x", env=0, all_tactics=True, root_goals=False, infotree="full"),
        {"cmd": "x", "env": 0, "allTactics": True, "rootGoals": False, "infotree": "full"},
    ),
    (repl.File("a.lean", all_tactics=True), {"path": "a.lean", "allTactics": True}),
    (repl.ProofStep(7, "simp"), {"proofState": 7, "tactic": "simp"}),
    (repl.PickleEnvironment("/tmp/a.olean", env=2), {"env": 2, "pickleTo": "/tmp/a.olean"}),
    (repl.UnpickleEnvironment("/tmp/a.olean"), {"unpickleEnvFrom": "/tmp/a.olean"}),
    (repl.PickleProofState(1, "p"), {"proofState": 1, "pickleTo": "p"}),
    (repl.UnpickleProofState("p", env=4), {"unpickleProofStateFrom": "p", "env": 4}),
    (repl.UnpickleProofState("p"), {"unpickleProofStateFrom": "p"}),
]
PLACE = {"line": 1, "column": 18}
MESSAGE = {"severity": "error", "pos": PLACE, "endPos": None, "data": "type mismatch\n ⊢ λ"}
SORRY = {"pos": PLACE, "endPos": PLACE, "goal": "⊢ Nat", "proofState": 0}
TACTIC = {
    "pos": PLACE,
    "endPos": PLACE,
    "goals": "⊢ 1 = 1",
    "tactic": "rfl",
    "proofState": 3,
    "usedConstants": ["rfl", "Eq"],
}
COMMAND = {
    "env": 6,
    "messages": [MESSAGE],
    "sorries": [SORRY],
    "tactics": [TACTIC],
    "infotree": [{"node": 1}],
}
STEP = {
    "proofState": 9,
    "goals": ["⊢ a", "⊢ b"],
    "proofStatus": "Incomplete: open goals remain",
    "messages": [MESSAGE],
    "sorries": [{"goal": "⊢ Nat"}],
    "traces": ["t"],
}


@pytest.mark.parametrize(("request_", "wire"), REQUESTS)
def test_a_request_is_one_compact_line_with_the_names_of_the_protocol(
    request_: repl.Request, wire: dict[str, object]
) -> None:
    line = request_.to_json()
    assert b"\n" not in line
    assert json.loads(line) == wire
    assert line.startswith(b'{"')  # the REPL does not answer what begins with `#` or `--`
    assert line == json.dumps(json.loads(line), separators=(",", ":"), ensure_ascii=False).encode()


def test_text_goes_out_as_utf8_and_what_is_none_is_an_input_error() -> None:
    assert repl.Command("λ\u2028\0").to_json() == '{"cmd":"λ\u2028\\u0000"}'.encode()
    with pytest.raises(
        InputError, match=r"^repl: the text of a request must be Unicode; got [^\n]*$"
    ):
        repl.Command("\ud800").to_json()


def test_a_full_answer_to_a_command_is_read() -> None:
    place = repl.Pos(1, 18)
    assert repl.read_command(COMMAND) == repl.CommandResponse(
        env=6,
        messages=(repl.ReplMessage(place, None, "error", "type mismatch\n ⊢ λ"),),
        sorries=(repl.Sorry("⊢ Nat", 0, place, place),),
        tactics=(repl.Tactic(place, place, "⊢ 1 = 1", "rfl", 3, ("rfl", "Eq")),),
        infotree=[{"node": 1}],
    )
    assert repl.read_command({"env": 0}) == repl.CommandResponse(0)
    assert repl.read_command({"env": 0, "later": 1}) == repl.CommandResponse(0)


def test_a_full_answer_to_a_tactic_is_read() -> None:
    assert repl.read_proof_step(STEP) == repl.ProofStepResponse(
        proof_state=9,
        goals=("⊢ a", "⊢ b"),
        proof_status="Incomplete: open goals remain",
        messages=(repl.ReplMessage(repl.Pos(1, 18), None, "error", "type mismatch\n ⊢ λ"),),
        sorries=(repl.Sorry("⊢ Nat", None, None, None),),
        traces=("t",),
    )


@pytest.mark.parametrize("read", [repl.read_command, repl.read_proof_step])
def test_an_error_is_exactly_a_message(read: Callable[[object], object]) -> None:
    assert read({"message": "Unknown environment."}) == repl.Error("Unknown environment.")
    with pytest.raises(MachineError, match=r"answer\.message must be a string; got 3"):
        read({"message": 3})


def spoil(answer: dict[str, object], path: str, value: object) -> dict[str, object]:
    """A copy of the answer with another value (or, for `...`, none) at a path like `a.0.b`."""
    spoilt = copy.deepcopy(answer)
    at: object = spoilt
    *way, last = path.split(".")
    for step in way:
        at = at[int(step)] if isinstance(at, list) else at[step]  # type: ignore[index]
    if value is ...:
        del at[last]  # type: ignore[attr-defined]
    else:
        at[int(last) if isinstance(at, list) else last] = value  # type: ignore[index]
    return spoilt


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("env", ..., "answer.env must be a whole number; it is missing"),
        ("env", "6", "answer.env must be a whole number; got '6'"),
        ("env", True, "answer.env must be a whole number; got True"),
        ("env", -1, "answer.env must be a whole number; got -1"),
        ("env", 1.5, "answer.env must be a whole number; got 1.5"),
        ("messages", {}, "answer.messages must be a list; got {}"),
        ("messages.0", "x", "answer.messages[0] must be an object; got 'x'"),
        ("messages.0.pos", ..., "answer.messages[0].pos must be an object; it is missing"),
        ("messages.0.pos.line", "1", "answer.messages[0].pos.line must be a whole number; got '1'"),
        ("messages.0.endPos", [], "answer.messages[0].endPos must be an object; got []"),
        ("messages.0.severity", None, "answer.messages[0].severity must be a string; got None"),
        ("messages.0.data", ..., "answer.messages[0].data must be a string; it is missing"),
        ("sorries.0.goal", 1, "answer.sorries[0].goal must be a string; got 1"),
        ("sorries.0.proofState", "0", "answer.sorries[0].proofState must be a whole number"),
        ("tactics.0.tactic", ..., "answer.tactics[0].tactic must be a string; it is missing"),
        ("tactics.0.usedConstants.1", 2, "answer.tactics[0].usedConstants[1] must be a string"),
        ("tactics.0.usedConstants", "x" * 99, "usedConstants must be a list; got 'xxxx"),
    ],
)
def test_a_malformed_answer_is_named_by_field(path: str, value: object, said: str) -> None:
    with pytest.raises(MachineError) as caught:
        repl.read_command(spoil(COMMAND, path, value))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("proofState", ..., "answer.proofState must be a whole number; it is missing"),
        ("goals", ..., "answer.goals must be a list; it is missing"),
        ("goals.1", None, "answer.goals[1] must be a string; got None"),
        ("proofStatus", 0, "answer.proofStatus must be a string; got 0"),
        ("traces.0", [], "answer.traces[0] must be a string; got []"),
    ],
)
def test_a_malformed_proof_step_is_named_by_field(path: str, value: object, said: str) -> None:
    with pytest.raises(MachineError) as caught:
        repl.read_proof_step(spoil(STEP, path, value))
    assert said in str(caught.value)


@pytest.mark.parametrize("answer", [None, [], "x", 3])
def test_an_answer_that_is_no_object_is_told_so(answer: object) -> None:
    with pytest.raises(MachineError, match=r"^repl: answer must be an object; got "):
        repl.read_command(answer)
