"""Random propositional statements that are provable without axioms, each with its proof term.

Formulas are drawn at random; a small backward search for terms keeps those it can prove. What it
finds is checked by Lean in the tests, so the search need not be complete, only seeded.
"""

import random
from dataclasses import dataclass, field

# "atom" has a name, "true" and "false" nothing, "not" one part, the rest two.
Formula = tuple["str | Formula", ...]
_BINARY = ("imp", "imp", "imp", "and", "and", "or", "or", "iff")
_LEAN = {"and": "And", "or": "Or", "iff": "Iff"}


def random_formula(rng: random.Random, atoms: int, connectives: int) -> Formula:
    """Draw a formula with this many connectives over the first `atoms` letters."""
    if connectives == 0:
        return ("atom", "abcd"[rng.randrange(atoms)])
    if rng.random() < 0.15:
        return ("not", random_formula(rng, atoms, connectives - 1))
    left = rng.randrange(connectives)
    parts = (left, connectives - 1 - left)
    return (rng.choice(_BINARY), *(random_formula(rng, atoms, part) for part in parts))


def lean(formula: Formula, *, inside: bool = False) -> str:
    """Write a formula as Lean; `inside` puts it in brackets where an argument needs them."""
    kind, *parts = formula
    if kind == "atom":
        return str(parts[0])
    if kind in ("true", "false"):
        return str(kind).capitalize()
    if kind == "imp":
        text = f"{lean(part(formula, 0), inside=_is_arrow(part(formula, 0)))} → "
        text += lean(part(formula, 1))
    elif kind == "not":
        text = f"Not {lean(part(formula, 0), inside=True)}"
    else:
        both = (lean(part(formula, i), inside=True) for i in (0, 1))
        text = f"{_LEAN[str(kind)]} {' '.join(both)}"
    return f"({text})" if inside else text


def english(formula: Formula) -> str:
    """Say a formula in words."""
    kind = formula[0]
    if kind == "atom":
        return str(formula[1])
    if kind == "not":
        inner = part(formula, 0)
        return (
            f"not {english(inner)}" if inner[0] == "atom" else f"it is not so that {_said(inner)}"
        )
    left, right = _said(part(formula, 0)), _said(part(formula, 1))
    return {
        "imp": f"if {left} then {right}",
        "and": f"both {left} and {right}",
        "or": f"either {left} or {right}",
        "iff": f"{left} exactly when {right}",
    }[str(kind)]


def _said(formula: Formula) -> str:
    plain = formula[0] == "atom" or (formula[0] == "not" and part(formula, 0)[0] == "atom")
    return english(formula) if plain else f"({english(formula)})"


def part(formula: Formula, index: int) -> Formula:
    """Return a part of a compound formula."""
    found = formula[1 + index]
    assert not isinstance(found, str)
    return found


def atoms_of(formula: Formula) -> list[str]:
    """The letters of a formula, in the order in which they first occur."""
    if formula[0] == "atom":
        return [str(formula[1])]
    found = [
        name for inner in formula[1:] if not isinstance(inner, str) for name in atoms_of(inner)
    ]
    return list(dict.fromkeys(found))


def rename(formula: Formula, names: dict[str, str]) -> Formula:
    """Put other letters for the letters of a formula."""
    if formula[0] == "atom":
        return ("atom", names[str(formula[1])])
    parts = (inner if isinstance(inner, str) else rename(inner, names) for inner in formula[1:])
    return (formula[0], *parts)


def _is_arrow(formula: Formula) -> bool:
    return formula[0] == "imp"


@dataclass
class _Search:
    """A depth-limited search; `steps` bounds the work on one formula, `names` counts variables."""

    steps: int = 3000
    names: int = field(default=0)

    def fresh(self) -> str:
        self.names += 1
        return f"x{self.names}"

    def prove(self, known: dict[Formula, str], goal: Formula, depth: int) -> str | None:
        """A term of type `goal` from those in `known`, None if `depth` steps find none."""
        self.steps -= 1
        if self.steps < 0 or depth < 0:
            return None
        known = _split_pairs(known)
        if goal in known:
            return known[goal]
        if ("false",) in known:
            return f"False.elim {argument(known['false',])}"
        kind = goal[0]
        if kind in ("imp", "not"):
            name = self.fresh()
            inner = part(goal, 1) if kind == "imp" else ("false",)
            body = self.prove({part(goal, 0): name} | known, inner, depth)
            return None if body is None else f"fun {name} => {body}"
        if kind in ("and", "iff"):
            left, right = part(goal, 0), part(goal, 1)
            wanted = (
                (left, right) if kind == "and" else (("imp", left, right), ("imp", right, left))
            )
            first = self.prove(known, wanted[0], depth)
            second = None if first is None else self.prove(known, wanted[1], depth)
            return None if second is None else f"⟨{first}, {second}⟩"
        return self._by_cases(known, goal, depth) or self._by_choice(known, goal, depth)

    def _by_cases(self, known: dict[Formula, str], goal: Formula, depth: int) -> str | None:
        """Distinguish the cases of the first disjunction at hand."""
        for fact, term in known.items():
            if fact[0] == "or":
                rest = {other: name for other, name in known.items() if other != fact}
                arms = []
                for index, arm in enumerate(("inl", "inr")):
                    name = self.fresh()
                    body = self.prove(rest | {part(fact, index): name}, goal, depth - 1)
                    if body is None:
                        return None
                    arms.append(f"| .{arm} {name} => {body}")
                return f"(match {term} with {' '.join(arms)})"
        return None

    def _by_choice(self, known: dict[Formula, str], goal: Formula, depth: int) -> str | None:
        """Choose a side of a disjunction, or apply an implication at hand to what it wants."""
        if goal[0] == "or":
            for index, side in enumerate(("inl", "inr")):
                if (body := self.prove(known, part(goal, index), depth - 1)) is not None:
                    return f".{side} {argument(body)}"
        for fact, term in known.items():
            if fact[0] not in ("imp", "not"):
                continue
            result = part(fact, 1) if fact[0] == "imp" else ("false",)
            if result in known:
                continue
            rest = {other: name for other, name in known.items() if other != fact}
            wanted = self.prove(rest, part(fact, 0), depth - 2)
            if wanted is None:
                continue
            applied = f"({term} {argument(wanted)})"
            if (body := self.prove(rest | {result: applied}, goal, depth - 1)) is not None:
                return body
        return None


def _split_pairs(known: dict[Formula, str]) -> dict[Formula, str]:
    """Add the halves of conjunctions and equivalences at hand, which then need not be kept."""
    result: dict[Formula, str] = {}
    queue = list(known.items())
    while queue:
        fact, term = queue.pop(0)
        if fact[0] == "and":
            queue[:0] = [(part(fact, 0), f"{term}.left"), (part(fact, 1), f"{term}.right")]
            result.setdefault(fact, term)
        elif fact[0] == "iff":
            left, right = part(fact, 0), part(fact, 1)
            queue[:0] = [
                (("imp", left, right), f"{term}.mp"),
                (("imp", right, left), f"{term}.mpr"),
            ]
            result.setdefault(fact, term)
        else:
            result.setdefault(fact, term)
    return result


def argument(term: str) -> str:
    """Write a term as an argument of a function: in brackets unless it is one word or has some."""
    closed = " " not in term or (term[0] in "(⟨" and _matching(term))
    return term if closed else f"({term})"


def prove(hypotheses: dict[Formula, str], goal: Formula) -> str | None:
    """Find a short proof term of `goal`, None if the search finds none."""
    for depth in range(1, 7):
        if (term := _Search().prove(hypotheses, goal, depth)) is not None:
            return bare(term)
    return None


def bare(term: str) -> str:
    """Take away a pair of brackets around the whole term."""
    return term[1:-1] if term[0] == "(" and _matching(term) else term


def _matching(term: str) -> bool:
    """Whether the bracket that the term begins with closes at its end."""
    depth = 0
    for i, letter in enumerate(term):
        depth += (letter in "(⟨") - (letter in ")⟩")
        if depth == 0:
            return i == len(term) - 1
    return False
