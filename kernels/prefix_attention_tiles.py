"""Which tile each attention kernel runs with: data, one table per architecture.

`fdfast kernels report` compiles every row of these tables and shows what it costs.
"""

from dataclasses import dataclass
from typing import NamedTuple

from fdfast.kernels import tiles

KINDS = ("forward", "dq", "dkv")


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


class Key(NamedTuple):
    """A row of the tables.

    Attributes:
        kind: in KINDS.
        size: bytes of an element.
        block_d: the head size, rounded up.
        masks: whether there is a window, or a head size that is no power of two: they cost
            registers.
    """

    kind: str
    size: int
    block_d: int
    masks: bool


Rows = dict[Key, AttentionTile]


def _rows(
    kind: str, size: int, block_ds: tuple[int, ...], tile: AttentionTile, masked: AttentionTile
) -> Rows:
    """The rows of a kernel for these widths, without masks and with them."""
    chosen = {False: tile, True: masked}
    return {Key(kind, size, d, masks): chosen[masks] for d in block_ds for masks in chosen}


def _table(*rows: Rows) -> Rows:
    """One table; the later of two rows counts."""
    return {key: tile for some in rows for key, tile in some.items()}


_SMALL = (16, 32, 64)
# Of float32, whose products take no tensor cores and many registers.
_SQUARE = AttentionTile(32, 32, 4, 2)
_FEW_KEYS = AttentionTile(32, 16, 8, 2)
_FEW_QUERIES = AttentionTile(16, 32, 8, 2)

SM_80 = _table(
    _rows("forward", 2, _SMALL, AttentionTile(128, 64, 4, 3), AttentionTile(64, 64, 4, 2)),
    _rows("dq", 2, _SMALL, AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
    _rows("dkv", 2, _SMALL, AttentionTile(64, 128, 8, 2), AttentionTile(32, 64, 4, 2)),
    _rows("dkv", 2, (16,), AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
    _rows("forward", 2, (128,), AttentionTile(128, 64, 8, 2), AttentionTile(64, 64, 8, 2)),
    _rows("dq", 2, (128,), AttentionTile(64, 64, 8, 2), AttentionTile(64, 64, 8, 2)),
    _rows("dkv", 2, (128,), AttentionTile(64, 64, 8, 2), AttentionTile(32, 64, 8, 2)),
    _rows("forward", 2, (256,), AttentionTile(64, 32, 8, 2), AttentionTile(64, 32, 8, 2)),
    _rows("dq", 2, (256,), AttentionTile(64, 32, 8, 2), AttentionTile(64, 32, 8, 2)),
    _rows("dkv", 2, (256,), AttentionTile(32, 32, 8, 2), AttentionTile(32, 32, 8, 2)),
    _rows("forward", 4, (16, 32), _SQUARE, _SQUARE),
    _rows("forward", 4, (64,), AttentionTile(64, 32, 8, 2), AttentionTile(64, 32, 8, 2)),
    _rows("dq", 4, _SMALL, _SQUARE, _SQUARE),
    _rows("dkv", 4, (16,), AttentionTile(64, 16, 8, 2), AttentionTile(64, 16, 8, 2)),
    _rows("dkv", 4, (32, 64), _FEW_KEYS, _FEW_KEYS),
    *(_rows(kind, 4, (128, 256), _FEW_KEYS, _FEW_KEYS) for kind in KINDS),
    _rows("dkv", 4, (128,), _FEW_QUERIES, _FEW_QUERIES),
    _rows("dq", 4, (256,), _FEW_QUERIES, _FEW_QUERIES),
)
SM_90 = _table(
    SM_80,
    _rows("forward", 2, _SMALL, AttentionTile(128, 64, 4, 3), AttentionTile(128, 64, 4, 3)),
    _rows("dq", 2, _SMALL, AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
    _rows("dkv", 2, _SMALL, AttentionTile(64, 64, 4, 2), AttentionTile(64, 64, 4, 2)),
    _rows("forward", 2, (128,), AttentionTile(128, 128, 8, 2), AttentionTile(128, 128, 8, 2)),
    _rows("dq", 2, (128,), AttentionTile(128, 64, 8, 2), AttentionTile(128, 64, 8, 2)),
    _rows("dkv", 2, (128,), AttentionTile(64, 64, 8, 2), AttentionTile(32, 128, 8, 2)),
    _rows("forward", 2, (256,), AttentionTile(128, 64, 8, 2), AttentionTile(128, 64, 8, 2)),
    _rows("dq", 2, (256,), AttentionTile(128, 32, 8, 2), AttentionTile(128, 32, 8, 2)),
    _rows("forward", 4, (32, 64), AttentionTile(32, 32, 8, 2), AttentionTile(32, 32, 8, 2)),
    _rows("dkv", 4, (32, 64), AttentionTile(32, 32, 8, 2), AttentionTile(32, 32, 8, 2)),
    _rows("dkv", 4, (16,), _SQUARE, _SQUARE),
    _rows("dkv", 4, (128,), _FEW_KEYS, _FEW_KEYS),
    _rows("dq", 4, (256,), _FEW_KEYS, _FEW_KEYS),
)
SM_100 = _table(
    SM_90,
    _rows("dq", 2, (64,), AttentionTile(128, 64, 8, 2), AttentionTile(128, 64, 8, 2)),
    _rows("dkv", 2, (64,), AttentionTile(64, 128, 8, 2), AttentionTile(64, 128, 8, 2)),
    _rows("forward", 2, (128,), AttentionTile(128, 64, 8, 2), AttentionTile(128, 64, 8, 2)),
    _rows("dkv", 2, (128,), AttentionTile(64, 64, 8, 2), AttentionTile(64, 64, 8, 2)),
    _rows("forward", 2, (256,), AttentionTile(128, 32, 8, 2), AttentionTile(128, 32, 8, 2)),
    _rows("dq", 4, (256,), _FEW_QUERIES, _FEW_QUERIES),
)

# The interpreter's cost follows the number of operations, so its tiles are large.
INTERPRET = {key: AttentionTile(64, 64, 4, 1) for key in SM_80}

TABLES = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "interpret": INTERPRET}
assert TABLES.keys() == tiles.TABLES.keys()
