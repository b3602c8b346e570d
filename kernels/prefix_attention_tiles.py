"""Which tile each attention kernel runs with: data, one table per architecture.

`fdfast kernels report` compiles every row of these tables and shows what it costs.
"""

from dataclasses import dataclass

from fdfast.kernels import tiles

KINDS = ("forward", "dq", "dkv")
BLOCK_DS = (16, 32, 64, 128, 256)  # head sizes, rounded up


@dataclass(frozen=True)
class AttentionTile:
    """How an attention kernel cuts its work.

    Attributes:
        block_q: queries of a tile.
        block_k: keys of a tile.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


Key = tuple[str, int, int]  # kind, bytes of an element, block_d


def _all(small: dict[tuple[str, int], AttentionTile]) -> dict[Key, AttentionTile]:
    """The rows of head sizes up to 64, from one row a kind and element size."""
    return {(*key, block_d): tile for key, tile in small.items() for block_d in (16, 32, 64)}


SM_80: dict[Key, AttentionTile] = {
    **_all(
        {
            ("forward", 2): AttentionTile(128, 64, 4, 3),
            ("dq", 2): AttentionTile(64, 64, 4, 2),
            ("dkv", 2): AttentionTile(64, 64, 4, 2),
            ("forward", 4): AttentionTile(32, 32, 4, 2),
            ("dq", 4): AttentionTile(32, 32, 4, 2),
            ("dkv", 4): AttentionTile(32, 32, 4, 2),
        }
    ),
    ("forward", 2, 128): AttentionTile(128, 64, 8, 2),
    ("dq", 2, 128): AttentionTile(64, 64, 8, 2),
    ("dkv", 2, 128): AttentionTile(64, 64, 8, 2),
    ("forward", 2, 256): AttentionTile(64, 32, 8, 2),
    ("dq", 2, 256): AttentionTile(64, 32, 8, 2),
    ("dkv", 2, 256): AttentionTile(32, 64, 8, 2),
    ("forward", 4, 128): AttentionTile(32, 32, 4, 2),
    ("dq", 4, 128): AttentionTile(32, 32, 8, 2),
    ("dkv", 4, 128): AttentionTile(32, 32, 8, 2),
    ("forward", 4, 256): AttentionTile(32, 16, 8, 2),
    ("dq", 4, 256): AttentionTile(32, 16, 8, 2),
    ("dkv", 4, 256): AttentionTile(16, 32, 8, 2),
}
SM_90 = {**SM_80}
SM_100 = {**SM_90}

# The interpreter's cost follows the number of operations, so its tiles are large.
INTERPRET = {key: AttentionTile(64, 64, 4, 1) for key in SM_80}

TABLES = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "interpret": INTERPRET}
assert TABLES.keys() == tiles.TABLES.keys()
