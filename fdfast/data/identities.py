"""Equations and facts that are drawn at random and true by a computation or a chain of steps.

Sums find their proof by a search through rewritings; Booleans and lists are computed on both sides.
"""

import itertools
import random
from collections.abc import Iterator
from typing import TypeAlias

from fdfast.data import propositions
from fdfast.data.draft import Draft


def equality_chains(rng: random.Random) -> Iterator[Draft]:
    """A path of equations, some read backwards, perhaps under a function."""
    while True:
        count = rng.randint(2, 5)
        letters = list("abcde"[:count])
        rng.shuffle(letters)
        given, steps = "", []
        for i, (x, y) in enumerate(itertools.pairwise(letters)):
            backwards = rng.random() < 0.5
            given += f" (h{i + 1} : Eq {y if backwards else x} {x if backwards else y})"
            steps.append(f"h{i + 1}.symm" if backwards else f"h{i + 1}")
        path = _left_nested(steps)
        uses = rng.randint(0, 2)
        first, last = letters[0], letters[-1]
        function = "fun x => " + "f (" * (uses - 1) + "f x" + ")" * (uses - 1)
        wrap = ("f (" * (uses - 1) + "f {}" + ")" * (uses - 1)) if uses else "{}"
        left, right = (wrap.format(x) for x in (first, last))
        goal = f"Eq ({left}) ({right})" if uses else f"Eq {first} {last}"
        proof = {0: path, 1: f"congrArg f {propositions.argument(path)}"}.get(
            uses, f"congrArg ({function}) {propositions.argument(path)}"
        )
        binder = f"(T : Type) ({' '.join(sorted(letters))} : T)" + (" (f : T → T)" if uses else "")
        effect = ("", ", so f takes both to the same", ", so f of f takes both to the same")[uses]
        words = f"Equations lead from {first} to {last}{effect}."
        yield Draft(f"{binder}{given} : {goal}", proof, words)


def _left_nested(steps: list[str]) -> str:
    text = steps[0]
    for step in steps[1:]:
        text = f"{propositions.argument(text)}.trans {step}"
    return text


def number_facts(rng: random.Random) -> Iterator[Draft]:
    """Arithmetic on numerals, which the kernel computes, and small order facts, step by step."""
    while True:
        x, y, z = (rng.randint(0, 12) for _ in range(3))
        form = rng.randrange(4)
        if form == 0:
            yield Draft(f": Eq (Nat.add {x} {y}) {x + y}", "rfl", f"{x} plus {y} is {x + y}.")
        elif form == 1:
            yield Draft(f": Eq (Nat.mul {x} {y}) {x * y}", "rfl", f"{x} times {y} is {x * y}.")
        elif form == 2:
            signature = f": Eq (Nat.add (Nat.mul {x} {y}) {z}) {x * y + z}"
            yield Draft(signature, "rfl", f"{x} times {y}, plus {z}, is {x * y + z}.")
        else:
            y = x + rng.randint(1, 5)
            proof = ".step (" * (y - x - 1) + ".step .refl" + ")" * (y - x - 1)
            yield Draft(f": Nat.le {x} {y}", proof, f"{x} is at most {y}.")


Tree: TypeAlias = "str | tuple[Tree, Tree]"


def sums(rng: random.Random) -> Iterator[Draft]:
    """Two ways to add up the same numbers; the proof is a shortest chain of rewritings."""
    while True:
        start = _random_sum(rng, list("nmk"[: rng.randint(2, 3)]))
        found = list(_reachable(start, limit=4))
        goal, steps = found[rng.randrange(1, len(found))]
        letters = sorted(_leaves(start), key="nmk".index)
        words = f"Show that {_sum_words(start)} equals {_sum_words(goal)}."
        signature = f"({' '.join(letters)} : Nat) : Eq {_show(start)} {_show(goal)}"
        yield Draft(signature, propositions.bare(_left_nested(steps)), words)


def _random_sum(rng: random.Random, letters: list[str]) -> Tree:
    rng.shuffle(letters)
    tree: Tree = letters[0]
    for letter in letters[1:]:
        tree = (tree, letter) if rng.random() < 0.5 else (letter, tree)
    return tree


def _reachable(start: Tree, *, limit: int) -> Iterator[tuple[Tree, list[str]]]:
    """Each sum that is reached by rewriting, nearest first, with the proofs of the steps."""
    seen: dict[Tree, list[str]] = {start: []}
    queue = [start]
    for tree in queue:
        yield tree, seen[tree]
        if len(seen[tree]) < limit:
            for after, step in _rewritings(tree):
                if after not in seen:
                    seen[after] = [*seen[tree], step]
                    queue.append(after)


def _rewritings(tree: Tree) -> Iterator[tuple[Tree, str]]:
    """Each sum one step away, with the proof of the equation."""
    if not isinstance(tree, tuple):
        return
    left, right = tree
    yield (right, left), f"(Nat.add_comm {_show(left)} {_show(right)})"
    if isinstance(left, tuple):
        after = (left[0], (left[1], right))
        parts = " ".join(map(_show, (left[0], left[1], right)))
        yield after, f"(Nat.add_assoc {parts})"
    if isinstance(right, tuple):
        parts = " ".join(map(_show, (left, right[0], right[1])))
        yield ((left, right[0]), right[1]), f"(Nat.add_assoc {parts}).symm"
    for inner, step in _rewritings(left):
        yield (inner, right), f"(congrArg (fun x => Nat.add x {_show(right)}) {step})"
    for inner, step in _rewritings(right):
        yield (left, inner), f"(congrArg (Nat.add {_show(left)}) {step})"


def _show(tree: Tree) -> str:
    return f"(Nat.add {_show(tree[0])} {_show(tree[1])})" if isinstance(tree, tuple) else str(tree)


def _sum_words(tree: Tree) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    left, right = (f"({_sum_words(x)})" if isinstance(x, tuple) else str(x) for x in tree)
    return f"{left} plus {right}"


def _leaves(tree: Tree) -> list[str]:
    return [*_leaves(tree[0]), *_leaves(tree[1])] if isinstance(tree, tuple) else [str(tree)]


def booleans(rng: random.Random) -> Iterator[Draft]:
    """Two Boolean expressions with the same truth table; the proof goes through the table."""
    while True:
        letters = ["p", "q"][: rng.randint(1, 2)]
        left, right = (_random_boolean(rng, letters, rng.randint(0, 4)) for _ in range(2))
        if left == right or {*_letters(left), *_letters(right)} != set(letters):
            continue
        rows = [dict(zip(letters, row, strict=True)) for row in _table(len(letters))]
        if any(_value(left, row) != _value(right, row) for row in rows):
            continue
        arms = " ".join(
            f"| {', '.join('.true' if row[x] else '.false' for x in letters)} => rfl"
            for row in rows
        )
        signature = f"({' '.join(letters)} : Bool) : Eq {_boolean(left)} {_boolean(right)}"
        proof = f"match {', '.join(letters)} with {arms}"
        words = f"By their truth tables, {_boolean_words(left)} equals {_boolean_words(right)}."
        yield Draft(signature, proof, words)


def _table(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((True, False), repeat=count))


def _random_boolean(rng: random.Random, letters: list[str], size: int) -> object:
    if size == 0:
        return rng.choice([*letters * 4, "true", "false"])
    if rng.random() < 0.3:
        return ("not", _random_boolean(rng, letters, size - 1))
    left = rng.randrange(size)
    parts = (_random_boolean(rng, letters, part) for part in (left, size - 1 - left))
    return (rng.choice(("and", "or")), *parts)


def _letters(tree: object) -> set[str]:
    if isinstance(tree, tuple):
        return set().union(*(_letters(part) for part in tree[1:]))
    return {str(tree)} & {"p", "q"}


def _value(tree: object, row: dict[str, bool]) -> bool:
    if not isinstance(tree, tuple):
        return row.get(str(tree), tree == "true")
    values = [_value(part, row) for part in tree[1:]]
    return {"not": not values[0], "and": all(values), "or": any(values)}[tree[0]]


def _boolean_words(tree: object) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    parts = [f"({_boolean_words(x)})" if isinstance(x, tuple) else str(x) for x in tree[1:]]
    return f"not {parts[0]}" if tree[0] == "not" else f" {tree[0]} ".join(parts)


def _boolean(tree: object) -> str:
    if isinstance(tree, tuple):
        return f"(Bool.{tree[0]} {' '.join(map(_boolean, tree[1:]))})"
    return str(tree) if tree in ("p", "q") else f"Bool.{tree}"


def lists(rng: random.Random) -> Iterator[Draft]:
    """A computation on a short list."""
    while True:
        xs = [rng.randint(0, 9) for _ in range(rng.randint(1, 4))]
        ys = [rng.randint(0, 9) for _ in range(rng.randint(1, 3))]
        forms = (
            ("List.length {}", str(len(xs)), "The length of {} is {}."),
            ("List.reverse {}", _list(xs[::-1]), "Backwards, {} is {}."),
            (f"List.append {{}} {_list(ys)}", _list(xs + ys), f"{{}} followed by {ys} is {{}}."),
            ("List.map Nat.succ {}", _list([x + 1 for x in xs]), "Each of {} plus 1 gives {}."),
            ("List.foldr Nat.add 0 {}", str(sum(xs)), "The numbers {} add up to {}."),
        )
        results: tuple[object, ...] = (len(xs), xs[::-1], xs + ys, [x + 1 for x in xs], sum(xs))
        chosen = rng.randrange(len(forms))
        expression, value, words = forms[chosen]
        signature = f": Eq ({expression.format(_list(xs))}) {value}"
        yield Draft(signature, "rfl", words.format(xs, results[chosen]))


def _list(items: list[int]) -> str:
    text = "List.nil"
    for item in reversed(items):
        text = f"(List.cons {item} {text})"
    return text
