"""The theorem set over the base library: `python -m fdfast.data.base_theorems --out PATH --seed 0`.

Every family draws from one seeded generator, so the same seed gives the same bytes. Families whose
statements are drawn at random find their proofs by search (propositions, sums) or by computing both
sides (numbers, Booleans, lists). Those that need an idea are written out in templates.jsonl, in the
order of its lines; `{name}` in a proof there is the theorem's own name, for recursion.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fdfast.data import base_theorems_path, identities, propositions
from fdfast.data.draft import Draft, list_words
from fdfast.data.jsonl import read_records, text_field
from fdfast.data.propositions import Formula
from fdfast.files import atomic_file

TEST_SHARE = 5  # every fifth theorem of a family, in shuffled order, is for testing
_NAME = r"[^\W\d][\w.]*"
_TEMPLATES = Path(__file__).with_name("templates.jsonl")


def easy(rng: random.Random) -> Iterator[Draft]:
    """One of several hypotheses is the goal: a proof is one name."""
    while True:
        letters = rng.sample("abcd", rng.randint(1, 4))
        names = rng.sample(["h", "h1", "h2", "hp", "hq", "k", "w"], len(letters))
        chosen = rng.randrange(len(letters))
        given = " ".join(f"({n} : {a})" for n, a in zip(names, letters, strict=True))
        prop = f"({' '.join(sorted(letters))} : Prop)"
        words = f"From {list_words(letters)} follows {letters[chosen]}."
        yield Draft(f"{prop} {given} : {letters[chosen]}", names[chosen], words)


def tautologies(rng: random.Random) -> Iterator[Draft]:
    """A random formula that holds without hypotheses."""
    while True:
        formula = propositions.random_formula(rng, rng.randint(1, 4), rng.randint(1, 5))
        yield from _proposition([], _in_order(formula))


def consequences(rng: random.Random) -> Iterator[Draft]:
    """A random formula that follows from one to three random ones, and not without them."""
    while True:
        atoms, count = rng.randint(2, 4), rng.randint(1, 3)
        parts = [propositions.random_formula(rng, atoms, rng.randint(1, 3)) for _ in range(count)]
        goal = propositions.random_formula(rng, atoms, rng.randint(0, 3))
        if goal in parts or propositions.prove({}, goal) is not None:
            continue
        if propositions.prove(dict.fromkeys(parts, "h"), ("false",)) is not None:
            continue  # from hypotheses that contradict each other anything follows
        whole = goal
        for given in reversed(parts):
            whole = ("imp", given, whole)
        whole = _in_order(whole)
        hypotheses = []
        for _ in range(count):
            hypotheses.append(propositions.part(whole, 0))
            whole = propositions.part(whole, 1)
        yield from _proposition(hypotheses, whole)


def _in_order(formula: Formula) -> Formula:
    """The formula with the letters a, b, c, ... in the order in which they occur."""
    return propositions.rename(
        formula, dict(zip(propositions.atoms_of(formula), "abcd", strict=False))
    )


def _proposition(hypotheses: list[Formula], goal: Formula) -> Iterator[Draft]:
    names = ["h"] if len(hypotheses) == 1 else [f"h{i + 1}" for i in range(len(hypotheses))]
    if len(set(hypotheses)) < len(hypotheses):
        return
    proof = propositions.prove(dict(zip(hypotheses, names, strict=True)), goal)
    # What the proof does not use makes no better theorem; what is very long, no better exercise.
    if proof is None or len(proof) > 160 or any(not re.search(rf"\b{n}\b", proof) for n in names):
        return
    letters = sorted({a for f in (*hypotheses, goal) for a in propositions.atoms_of(f)})
    given = "".join(
        f" ({n} : {propositions.lean(f)})" for n, f in zip(names, hypotheses, strict=True)
    )
    signature = f"({' '.join(letters)} : Prop){given} : {propositions.lean(goal)}"
    words = f"Show that {propositions.english(goal)}."
    if hypotheses:
        words = f"Suppose that {'; '.join(map(propositions.english, hypotheses))}. {words}"
    yield Draft(signature, _tidy(proof), words)


def _tidy(proof: str) -> str:
    """Join nested lambdas and leave unused variables without a name."""
    while (joined := re.sub(r"(fun [\w ]+) => fun ", r"\1 ", proof)) != proof:
        proof = joined
    names = dict.fromkeys(re.findall(r"\bx\d+\b", proof))
    for name in names:
        if len(re.findall(rf"\b{name}\b", proof)) == 1:
            proof = re.sub(rf"\b{name}\b", "_", proof)
    for i, name in enumerate(dict.fromkeys(re.findall(r"\bx\d+\b", proof))):
        proof = re.sub(rf"\b{name}\b", f"y{i}", proof)
    return re.sub(
        r"\by(\d+)\b", lambda m: "xyzuvwpqrst"[int(m[1])] if int(m[1]) < 11 else m[0], proof
    )


_RANDOM_FAMILIES: tuple[tuple[str, int, Callable[[random.Random], Iterator[Draft]]], ...] = (
    ("easy", 15, easy),
    ("taut", 50, tautologies),
    ("conseq", 60, consequences),
    ("chain", 25, identities.equality_chains),
    ("calc", 25, identities.number_facts),
    ("sum", 20, identities.sums),
    ("bool", 20, identities.booleans),
    ("list", 20, identities.lists),
)


def shape(signature: str) -> str:
    """The signature with its variables numbered as they occur, in the goal first.

    Two signatures that differ in the names of variables, or in the order in which variables of one
    type are listed, have the same shape.
    """
    groups = re.findall(r"[({]([^:(){}]+) : ", signature)
    variables = {name for group in groups for name in group.split()}
    given, _, goal = signature.rpartition(" : ")
    numbers: dict[str, str] = {}
    for word in re.findall(_NAME, f"{goal} {given}"):
        if word in variables:
            numbers.setdefault(word, f"v{len(numbers)}")
    text = re.sub(_NAME, lambda m: numbers.get(m[0], m[0]), f"{goal} given {given}")
    return re.sub(r"(?<=[({])[^:(){}]+ : ", lambda m: " ".join(sorted(m[0].split())), text)


def generate(seed: int) -> list[dict[str, str]]:
    """Return the records of the theorem set, in order."""
    rng = random.Random(seed)
    families: dict[str, list[Draft]] = {}
    seen: set[str] = set()
    for family, count, draw in _RANDOM_FAMILIES:
        kept = families.setdefault(family, [])
        source = draw(rng)
        while len(kept) < count:
            draft = next(source)
            if shape(draft.signature) not in seen:
                seen.add(shape(draft.signature))
                kept.append(draft)
    for family, draft in _templates():
        assert shape(draft.signature) not in seen, draft.signature
        seen.add(shape(draft.signature))
        families.setdefault(family, []).append(draft)
    return [record for family, drafts in families.items() for record in _name(rng, family, drafts)]


def _templates() -> Iterator[tuple[str, Draft]]:
    """The written theorems, each with its family."""
    for number, record in read_records(_TEMPLATES):
        fields = (
            text_field(record, field, place=f"{_TEMPLATES}:{number}")
            for field in ("family", "signature", "proof", "words")
        )
        family, signature, proof, words = fields
        yield family, Draft(signature, proof, words)


def _name(rng: random.Random, family: str, drafts: list[Draft]) -> Iterator[dict[str, str]]:
    """The records of one family, named, numbered and divided into train and test."""
    test = set(rng.sample(range(len(drafts)), len(drafts) // TEST_SHARE))
    for i, draft in enumerate(drafts):
        name = f"{family}_{i + 1:03d}"
        yield {
            "name": name,
            "split": "test" if i in test else "train",
            "informal_prefix": f"/-- {draft.words} -/\n",
            "formal_statement": f"theorem {name} {draft.signature} :=",
            "header": "",
            "proof": draft.proof.replace("{name}", name),
        }


def main() -> None:
    """Write the theorem set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=base_theorems_path(), metavar="PATH")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = (json.dumps(record, ensure_ascii=False) for record in generate(arguments.seed))
    with atomic_file(arguments.out) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
