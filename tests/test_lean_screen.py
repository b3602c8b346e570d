"""What the screen refuses in a proof and in a context, and what it lets pass as a name."""

import pytest

from fdfast.lean import screen

WORDS = """
    simproc_decl dsimproc_decl dsimproc register_option declare_config_elab grind_pattern unif_hint
    unsafeCast unsafeIO Lean.unsafeBaseIO
    """


@pytest.mark.parametrize("word", WORDS.split())
def test_a_proof_has_no_such_word(word: str) -> None:
    assert screen.refuse_proof(f"id {word} h") == f"`{word}` in the proof"


CONTEXTS = [
    *("simproc x (_) := y", "simproc_decl x (_) := y", "dsimproc x (_) := y", "@[init] def x := y"),
    *("@[term_elab x] def y := z", "@[command_elab x] def y := z", "@[tactic x] def y := z"),
    *("@[simp, csimp] theorem x : y := z", '@[extern "x"] def y := z', "@[macro x] def y := z"),
    *(
        "attribute [local simp, init x] y",
        "attribute [implemented_by x] y",
        "@[init\n x] def y := z",
    ),
    *("@[builtin_init] def x := y", "@[«builtin_tactic» x] def y := z", "@[«init»] def y := z"),
    *(
        '@[x "]", init] def y := z',
        "@[x [1], init] def y := z",
        '@[x "a\\"]", tactic x] def y := z',
    ),
]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_runs_no_code_in_lean(context: str) -> None:
    assert screen.refuse_context(f"{context}\n").endswith("` above the theorem")


@pytest.mark.parametrize(
    "context",
    [
        "@[simp]\ndef init (tactic : Nat) : Nat := tactic\n",
        "@[simp] theorem x : List.init [1] = [] := rfl\n#check y[init]\n",
        "axiom choice_of_mine : True\naxiom soundness : True\n",
    ],
)
def test_an_honest_context_may_use_such_words_as_names(context: str) -> None:
    assert screen.refuse_context(context) == ""
