"""Which tile each kernel runs with: data, one table per architecture.

A tile never depends on the number of tokens, so a token's result does not depend on the tokens
beside it. `fdfast kernels report` compiles every row of these tables and shows what it costs.
Legend: N tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a GEMM kernel cuts its work.

    Attributes:
        block_n: tokens of a tile.
        block_v: vocabulary columns of a tile.
        block_d: hidden dimensions a step of the inner loop.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        parts: a power of two: column parts in which the work after the GEMM is done, so that it
            fits the registers.
        split_v: vocabulary columns a program of a sweep walks through; a multiple of block_v.
        group_n: token blocks that meet the vocabulary together, for L2.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    parts: int = 1
    split_v: int = 2048
    group_n: int = 16


# Keyed by (what, bytes of an element): one GEMM accumulator (student alone), or two (with a
# teacher's hidden states) and then what is done with them. keep_: the sweep that stores the logits.
SM_80 = {
    ("single", 2): Tile(128, 128, 32, 8, 3, parts=2),
    ("pair", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("pair_softcap", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("settle", 2): Tile(64, 128, 32, 8, 3, parts=4),
    ("grad_single", 2): Tile(128, 128, 32, 8, 3, parts=2),
    ("grad_pair", 2): Tile(64, 128, 32, 8, 3, parts=4),
    ("topk", 2): Tile(64, 128, 32, 8, 3),
    ("keep_single", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("keep_single_softcap", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("keep_pair", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("keep_pair_softcap", 2): Tile(64, 128, 32, 8, 3, parts=2),
    ("single", 4): Tile(32, 64, 32, 4, 2),
    ("pair", 4): Tile(64, 64, 32, 8, 2),
    ("pair_softcap", 4): Tile(64, 64, 32, 8, 2),
    ("settle", 4): Tile(64, 64, 32, 8, 2),
    ("grad_single", 4): Tile(64, 64, 32, 4, 2),
    ("grad_pair", 4): Tile(64, 64, 32, 8, 2),
    ("topk", 4): Tile(64, 64, 32, 4, 2),
    ("keep_single", 4): Tile(32, 64, 32, 8, 2),
    ("keep_single_softcap", 4): Tile(32, 64, 32, 8, 2),
    ("keep_pair", 4): Tile(64, 64, 32, 8, 2),
    ("keep_pair_softcap", 4): Tile(64, 64, 32, 8, 2),
}
SM_90 = {
    **SM_80,
    ("single", 2): Tile(128, 128, 64, 8, 4, parts=2),
    ("pair", 2): Tile(128, 128, 64, 8, 4, parts=4),
    ("pair_softcap", 2): Tile(64, 128, 64, 8, 4, parts=2),
    ("settle", 2): Tile(64, 128, 64, 8, 4, parts=4),
    ("grad_single", 2): Tile(128, 128, 64, 8, 4, parts=2),
    ("grad_pair", 2): Tile(128, 128, 64, 8, 4, parts=8),
    ("topk", 2): Tile(64, 128, 64, 8, 4),
    ("single", 4): Tile(64, 64, 32, 4, 2),
    ("keep_single", 2): Tile(128, 128, 64, 8, 4, parts=8),
    ("keep_single_softcap", 2): Tile(128, 128, 64, 8, 4, parts=4),
    ("keep_pair", 2): Tile(64, 128, 64, 8, 4, parts=4),
    ("keep_pair_softcap", 2): Tile(64, 128, 64, 8, 4, parts=2),
    ("keep_single", 4): Tile(32, 64, 32, 4, 2),
    ("keep_single_softcap", 4): Tile(32, 64, 32, 4, 2),
}
# The accumulators lie in tensor memory: more registers are free.
SM_100 = {
    **SM_90,
    ("settle", 2): Tile(128, 128, 64, 8, 4, parts=16),
    ("grad_pair", 2): Tile(128, 128, 64, 8, 4, parts=4),
    ("single", 4): Tile(64, 64, 32, 4, 2, parts=2),
    ("keep_single", 2): Tile(64, 128, 64, 8, 4, parts=4),
    ("keep_single_softcap", 2): Tile(64, 128, 64, 8, 4, parts=4),
    ("keep_pair", 2): Tile(128, 128, 64, 8, 4, parts=8),
    ("keep_pair_softcap", 2): Tile(128, 128, 64, 8, 4, parts=8),
}

# The interpreter's cost follows the number of operations, so its tiles are large.
INTERPRET = {key: Tile(64, 1024, 256, 4, 1) for key in SM_80}

TABLES = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "interpret": INTERPRET}


def table_name(capability: tuple[int, int]) -> str:
    """The table of a compute capability; a chip without its own (8.6, 8.9, 12.x) takes sm_80's,
    which fits every shared memory since.
    """
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")
