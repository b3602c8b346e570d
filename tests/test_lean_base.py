"""The names the kernel computes by big-number arithmetic mean the usual functions in FdBase.

Where they did not, one numeral equation would hold by arithmetic and its contrary by definition.
"""

import math
from collections.abc import Callable

from fdfast.lean import verify, verify_many

# What the kernel takes each name to mean, and the definition with its shortcut for that name left
# out. Divisors of 0 are handled above `divFuel`.
BY_DEFINITION: dict[str, Callable[[int, int], int | None]] = {
    "Nat.divFuel {a} {a} {b}": lambda a, b: a // b if b else None,
    "Nat.sub {a} (Nat.mul {b} (Nat.div {a} {b}))": lambda a, b: a % b if b else a,
    "Nat.gcdFuel {a} {a} {b}": math.gcd,
    "Nat.log2Fuel {a} {a}": lambda a, _: max(a.bit_length() - 1, 0),
    "Nat.bitwiseFuel Bool.and (Nat.add {a} {b}) {a} {b}": lambda a, b: a & b,
    "Nat.bitwiseFuel Bool.or (Nat.add {a} {b}) {a} {b}": lambda a, b: a | b,
    "Nat.bitwiseFuel Bool.xor (Nat.add {a} {b}) {a} {b}": lambda a, b: a ^ b,
    "Nat.mul {a} (Nat.pow 2 {b})": lambda a, b: a << b,
    "Nat.div {a} (Nat.pow 2 {b})": lambda a, b: a >> b,
}
# With variables the kernel has no numerals to compute with, so these hold by the definitions.
RECURSIONS = (
    "Eq (Nat.add n 0) n",
    "Eq (Nat.add n (.succ m)) (.succ (Nat.add n m))",
    "Eq (Nat.mul n 0) 0",
    "Eq (Nat.mul n (.succ m)) (Nat.add (Nat.mul n m) n)",
    "Eq (Nat.pow n 0) 1",
    "Eq (Nat.pow n (.succ m)) (Nat.mul (Nat.pow n m) n)",
    "Eq (Nat.sub n 0) n",
    "Eq (Nat.sub n (.succ m)) (Nat.pred (Nat.sub n m))",
    "Eq (Nat.pred (.succ n)) n",
    "Eq (Nat.pred 0) 0",
    "Eq (Nat.beq 0 0) .true",
    "Eq (Nat.beq 0 (.succ m)) .false",
    "Eq (Nat.beq (.succ n) 0) .false",
    "Eq (Nat.beq (.succ n) (.succ m)) (Nat.beq n m)",
    "Eq (Nat.ble 0 m) .true",
    "Eq (Nat.ble (.succ n) 0) .false",
    "Eq (Nat.ble (.succ n) (.succ m)) (Nat.ble n m)",
    "Eq (Nat.div n 0) 0",
    "Eq (Nat.div n (.succ m)) (Nat.divFuel n n (.succ m))",
    "Eq (Nat.mod n m) (Nat.sub n (Nat.mul m (Nat.div n m)))",
    "Eq (Nat.gcd n m) (Nat.gcdFuel n n m)",
    "Eq (Nat.log2 n) (Nat.log2Fuel n n)",
    "Eq (Nat.land n m) (Nat.bitwiseFuel Bool.and (Nat.add n m) n m)",
    "Eq (Nat.lor n m) (Nat.bitwiseFuel Bool.or (Nat.add n m) n m)",
    "Eq (Nat.xor n m) (Nat.bitwiseFuel Bool.xor (Nat.add n m) n m)",
    "Eq (Nat.shiftLeft n m) (Nat.mul n (Nat.pow 2 m))",
    "Eq (Nat.shiftRight n m) (Nat.div n (Nat.pow 2 m))",
)


def conjunction(statements: list[str]) -> tuple[str, str]:
    """One statement and its proof by computing, for many equations: one check in place of many."""
    statement, proof = statements[-1], "rfl"
    for other in reversed(statements[:-1]):
        statement, proof = f"And ({other}) ({statement})", f"⟨rfl, {proof}⟩"
    return statement, proof


def test_the_definitions_compute_what_the_kernel_takes_them_for() -> None:
    items = []
    for form, meaning in BY_DEFINITION.items():
        equations = [
            f"Eq ({form.format(a=a, b=b)}) {value}"
            for a in (0, 1, 2, 5, 6, 8)
            for b in (0, 1, 3, 4, 6)
            if (value := meaning(a, b)) is not None
        ]
        statement, proof = conjunction(equations)
        items.append((f"theorem t : {statement} :=", proof, ""))
    statement, proof = conjunction(list(RECURSIONS))
    items.append((f"theorem t (n m : Nat) : {statement} :=", proof, ""))
    for item, verdict in zip(items, verify_many(items), strict=True):
        assert verdict.proved, f"{item[0][:80]}: {verdict}"


def test_no_file_can_give_these_names_another_meaning() -> None:
    names = "add sub mul div mod gcd pow log2 beq ble land lor xor shiftLeft shiftRight succ"
    for name in names.split():
        header = f"namespace Nat\nopaque {name} : Nat\nend Nat\n"
        verdict = verify("theorem t : True :=", "True.intro", header=header)
        assert verdict.kind == "rejected", name
        assert f"`Nat.{name}` has already been declared" in verdict.reason
    header = "opaque Lean.reduceBool (b : Bool) : Bool\n"
    verdict = verify("theorem t : True :=", "True.intro", header=header)
    assert verdict.reason == "`Lean.reduceBool` above the theorem"


def test_a_string_literal_is_the_list_of_its_characters() -> None:
    characters = "(List.cons (Char.ofNat 97) (List.cons (Char.ofNat 955) List.nil))"
    statement = f'theorem t : Eq "a\u03bb" (String.ofList {characters}) :='
    assert verify(statement, "rfl").proved
    assert verify('theorem t : Eq "a" "b" :=', "rfl").kind == "failed"


def test_a_hole_is_a_warning_as_in_full_lean() -> None:
    # `sorry` in a header is the caller's: what does not use it is proved all the same.
    header = "theorem open_end : False := sorry\n"
    verdict = verify("theorem t : True :=", "True.intro", header=header)
    assert verdict.proved
    assert [message.text for message in verdict.messages] == ["declaration uses `sorry`"]
    assert verdict.messages[0].severity == "warning"
