"""Blocks of tokens x vocabulary that fit a workspace, and the GEMMs on them; shared by the
operations of this folder.

Legend: N trained tokens, D hidden, V vocabulary, R tokens of a chunk, B vocabulary columns of a
block, S student and teacher, if there is one.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fdfast import _cpu
from fdfast.cpu.gemm import Gemms, write_product
from fdfast.errors import InputError
from fdfast.types import Head

# Beyond this many tokens a GEMM is as fast as it gets, and a shorter chunk leaves room for a wider
# block.
MAX_CHUNK_TOKENS = 1024
MIN_BLOCK_COLUMNS = 256


def call(name: str, dtype: torch.dtype, *args: object) -> None:
    """Call the C++ function for `dtype`; tensors go as addresses, None as null."""
    addresses: list[object] = []
    for arg in args:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous(), f"{name}: csrc wants contiguous tensors"
            addresses.append(arg.data_ptr())
        else:
            addresses.append(0 if arg is None else arg)
    getattr(_cpu, f"{name}_{str(dtype).removeprefix('torch.')}")(*addresses)


def slices(length: int, step: int) -> Iterator[slice]:
    """0..length in steps; the last may be shorter."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def hidden_rows(head: Head, rows_N: Tensor | None, chunk: slice, dtype: torch.dtype) -> Tensor:
    """The chunk's hidden states, (R, D) in `dtype`; rows_N names the trained tokens, None is all of
    them.
    """
    if rows_N is None:
        return head.hidden_ND[chunk].to(dtype)
    return head.hidden_ND.index_select(0, rows_N[chunk]).to(dtype)


def project(
    out_SRB: Tensor, hidden: list[Tensor], heads: list[tuple[Tensor, Tensor | None]]
) -> None:
    """Raw logits of one block: hidden @ weight.T + bias, of student and teacher, if there is one.

    A weight that both share in bfloat16 is packed once for both; the bits of a row don't depend on
    its neighbours there, as they may in PyTorch's GEMMs.
    """
    weight_BD = heads[0][0]
    if len(heads) == 2 and heads[1][0] is weight_BD and weight_BD.dtype == torch.bfloat16:
        write_product(out_SRB.flatten(0, 1), torch.cat(hidden), weight_BD.T)
    else:
        for out_RB, rows_RD, (other_BD, _) in zip(out_SRB, hidden, heads, strict=True):
            write_product(out_RB, rows_RD, other_BD.T)
    for out_RB, (_, bias_B) in zip(out_SRB, heads, strict=True):
        if bias_B is not None:
            out_RB.add_(bias_B)


def converted(head: Head, block: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight (B, D) of a vocabulary block in `dtype`, a view where it has it already, and bias
    (B,).
    """
    bias_V = head.bias_V
    return head.weight_VD[block].to(dtype), None if bias_V is None else bias_V[block]


def converted_all(
    heads: list[Head], block: slice, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor | None]]:
    """`converted` of each head; a weight that student and teacher share is converted once."""
    first = converted(heads[0], block, dtype)
    blocks = [first]
    for head in heads[1:]:
        shared = head.weight_VD.data_ptr() == heads[0].weight_VD.data_ptr()
        shared = shared and head.weight_VD.stride() == heads[0].weight_VD.stride()
        bias_B = None if head.bias_V is None else head.bias_V[block]
        blocks.append((first[0], bias_B) if shared else converted(head, block, dtype))
    return blocks


def _copied_columns_bytes(head: Head | None, dtype: torch.dtype) -> int:
    """Bytes a vocabulary column of the head's weight needs in a copy of `dtype`: none where it is
    that already.
    """
    if head is None or head.weight_VD.dtype == dtype:
        return 0
    return head.weight_VD.shape[1] * dtype.itemsize


class RowBlocks:
    """Chunks of tokens against the whole vocabulary: logits (R, V) of student and teacher in one
    workspace.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        rows_N: Tensor | None,
        *,
        dtype: torch.dtype,
        gemms: Gemms,
        workspace_bytes: int,
        operation: str = "policy_head",
        agree: Callable[[int], int] = int,
    ) -> None:
        """`workspace_bytes`: without the scratch of `gemms`. `agree`: from the tokens of a chunk
        that fit here to those that all ranks take.
        """
        self.teacher = teacher
        self.heads = [student] if teacher is None else [student, teacher]
        self.rows_N, self.dtype, self.operands = rows_N, dtype, gemms.operands
        self.num_tokens = len(student.hidden_ND) if rows_N is None else len(rows_N)
        self.vocabulary = len(student.weight_VD)
        copied = sum(_copied_columns_bytes(head, gemms.operands) for head in self.heads)
        self.columns = self.vocabulary
        if copied:  # a quarter of the workspace holds the converted copy
            self.columns = max(1, min(self.vocabulary, workspace_bytes // 4 // copied))
        row_bytes = sum(self.vocabulary + h.weight_VD.shape[1] for h in self.heads) * dtype.itemsize
        left = workspace_bytes - copied * self.columns
        self.tokens = agree(min(MAX_CHUNK_TOKENS, self.num_tokens, left // row_bytes))
        if self.tokens >= 1:  # chunks of one length: a short one would be slow
            chunks = -(-self.num_tokens // self.tokens)
            self.tokens = -(-self.num_tokens // chunks)
        elif self.num_tokens:
            raise too_small(operation, workspace_bytes, 2 * row_bytes + 4 * copied)
        size = len(self.heads) * max(1, self.tokens) * self.vocabulary
        self.buffer = torch.empty(size, dtype=dtype)

    def chunks(self) -> Iterator[slice]:
        """The trained tokens in chunks."""
        return slices(self.num_tokens, max(1, self.tokens))

    def project(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        """Raw logits of the chunk, (R, V), of student and teacher."""
        R = chunk.stop - chunk.start
        shape = (len(self.heads), R, self.vocabulary)
        logits_SRV = self.buffer[: math.prod(shape)].view(shape)
        hidden = [hidden_rows(h, self.rows_N, chunk, self.operands) for h in self.heads]
        for block in slices(self.vocabulary, self.columns):
            heads = converted_all(self.heads, block, self.operands)
            project(logits_SRV[:, :, block], hidden, heads)
            del heads  # before the next block's are made
        return logits_SRV[0], logits_SRV[1] if len(logits_SRV) > 1 else None


def tile_shape(
    student: Head,
    teacher: Head | None,
    num_tokens: int,
    dtype: torch.dtype,
    gemms: Gemms,
    workspace_bytes: int,
) -> tuple[int, int]:
    """Tokens and vocabulary columns of the blocks that fit.

    Raises:
        InputError: not even one token with one column fits.
    """
    V, size = len(student.weight_VD), dtype.itemsize
    widths = [h.weight_VD.shape[1] for h in (student, teacher) if h is not None]
    # A block is converted and its gradient summed beside it.
    column = sum(_copied_columns_bytes(head, gemms.operands) for head in (student, teacher))
    column += _copied_columns_bytes(student, dtype)
    if not student.weight_VD.is_contiguous():  # a filter wants whole rows
        column += widths[0] * size
    column += 4 * size  # bias and its gradient
    row = (sum(widths) + widths[0]) * size  # hidden rows of both heads, a product of the student's
    tokens = max(1, min(MAX_CHUNK_TOKENS, num_tokens))
    while True:
        logits = len(widths) * size
        columns = (workspace_bytes - tokens * row) // (column + tokens * logits)
        if columns >= min(MIN_BLOCK_COLUMNS, V) or tokens == 1:
            break
        tokens = (tokens + 1) // 2
    if columns < 1:
        raise too_small("policy_head", workspace_bytes, 2 * (column + row + logits))
    return tokens, min(columns, V)


class TileBlocks:
    """Blocks of vocabulary, and in each the chunks of tokens: logits (R, B) of student and teacher
    in one workspace.
    """

    def __init__(
        self,
        student: Head,
        teacher: Head | None,
        rows_N: Tensor | None,
        *,
        dtype: torch.dtype,
        gemms: Gemms,
        workspace_bytes: int,
    ) -> None:
        """`workspace_bytes`: without the scratch of `gemms`."""
        self.heads = [student] if teacher is None else [student, teacher]
        self.rows_N, self.operands = rows_N, gemms.operands
        self.num_tokens = len(student.hidden_ND) if rows_N is None else len(rows_N)
        self.vocabulary = len(student.weight_VD)
        self.tokens, self.columns = tile_shape(
            student, teacher, self.num_tokens, dtype, gemms, workspace_bytes
        )
        size = len(self.heads) * self.tokens * self.columns
        self.buffer = torch.empty(size, dtype=dtype)

    def vocabulary_blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks."""
        return slices(self.vocabulary, self.columns)

    def chunks(self) -> Iterator[slice]:
        """The trained tokens in chunks."""
        return slices(self.num_tokens, self.tokens)

    def converted(self, block: slice) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the block, of student and teacher, as the products want them."""
        return converted_all(self.heads, block, self.operands)

    def project(
        self, chunk: slice, hidden_RD: Tensor, heads: list[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """Raw logits of the block, (R, B), of the student (its hidden rows are given) and the
        teacher.
        """
        shape = (len(heads), len(hidden_RD), len(heads[0][0]))
        hidden = [hidden_RD]
        hidden += [hidden_rows(h, self.rows_N, chunk, self.operands) for h in self.heads[1:]]
        logits_SRB = self.buffer[: math.prod(shape)].view(shape)
        project(logits_SRB, hidden, heads)
        return logits_SRB[0], logits_SRB[1] if len(logits_SRB) > 1 else None


def too_small(operation: str, workspace_bytes: int, wanted_bytes: int) -> InputError:
    """The error of a workspace in which not even one token fits."""
    mib = wanted_bytes / 2**20
    return InputError(
        f"{operation}: workspace_mb={workspace_bytes / 2**20:.3g} holds not even one token of this "
        f"vocabulary; give workspace_mb={mib:.2g} or more"
    )
