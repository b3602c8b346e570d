"""Problems to prove: readers of the published theorem sets, and a set that we ship."""

from pathlib import Path


def base_theorems_path() -> Path:
    """Return the packaged theorem set: statements over the base library FdBase, each with a proof.

    Made by `python -m fdfast.data.base_theorems`; read it with `fdfast.data.jsonl.read_theorems`.
    """
    return Path(__file__).with_name("base_theorems.jsonl")
