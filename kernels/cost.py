"""A model of what `policy_head` and its peers cost on a GPU: arithmetic, nothing is run.

A loss of student and teacher hidden states, forward and backward, trained head, bfloat16 inputs.
One GEMM unit is 2 N D V operations: a projection, or one of the two products of the gradient. The
time is the units at a sustained rate plus, not overlapped with them, the traffic: every pass over
logits and every accumulator that is read and written again. Weights and hidden states that a GEMM
reads are hidden behind its arithmetic.

Legend: N tokens, D hidden, V vocabulary, R tokens of a chunk, B columns of a block.
"""

from dataclasses import dataclass

# Dense bfloat16 peak without sparsity, and memory bandwidth: nominal numbers of the vendor's SXM
# parts (A100 with 80 GB).
TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0, "b200": 2250.0}
BANDWIDTH_TB = {"a100": 2.04, "h100": 3.35, "h200": 4.8, "b200": 8.0}
# Assumed, not measured: large library GEMMs hold 800 of an H100's 989 TFLOP/s. A Triton GEMM with
# statistics after each tile holds three quarters of that: chosen so that `recompute` agrees with
# the 98 ms of the design, so that agreement proves nothing.
LIBRARY_SHARE = 800 / 989
TRITON_SHARE = 0.75
WAYS = ("recompute", "chunk")


@dataclass(frozen=True)
class Cost:
    """What one way of computing the loss takes; modelled.

    Attributes:
        way: for people.
        units: GEMM units in a library's GEMM.
        triton_units: GEMM units in kernels of this project.
        flops: of all units.
        traffic_bytes: passes over logits, and accumulators.
        workspace_bytes: the most held beside inputs, gradients and N-sized outputs.
        note: what it rests on.
    """

    way: str
    units: int
    triton_units: int
    flops: float
    traffic_bytes: float
    workspace_bytes: float
    note: str = ""

    def time_ms(self, gpu: str) -> float:
        """The modelled time on a GPU, milliseconds.

        Args:
            gpu: a name in TFLOPS.
        """
        unit_s = self.flops / (self.units + self.triton_units) / _rate(gpu)
        gemm_s = unit_s * (self.units + self.triton_units / TRITON_SHARE)
        return 1e3 * (gemm_s + self.traffic_bytes / (BANDWIDTH_TB[gpu] * 1e12))


def _rate(gpu: str) -> float:
    """Sustained operations a second of a library's GEMM."""
    return TFLOPS[gpu] * 1e12 * LIBRARY_SHARE


def _cost(
    way: str,
    shape: tuple[int, int, int],
    *,
    units: int,
    logit_bytes: float,
    triton_units: int = 0,
    other_bytes: float = 0.0,
    workspace_bytes: float = 0.0,
    note: str = "",
) -> Cost:
    """`logit_bytes` are moved for each of the N V logits, `other_bytes` in all."""
    N, D, V = shape
    flops = 2.0 * N * D * V * (units + triton_units)
    traffic = float(N) * V * logit_bytes + other_bytes
    return Cost(way, units, triton_units, flops, traffic, workspace_bytes, note)


def floor(N: int, D: int, V: int) -> Cost:
    """Two projections and two gradient products, and nothing else."""
    return _cost("floor: the four GEMMs", (N, D, V), units=4, logit_bytes=0)


def recompute(N: int, D: int, V: int, *, jsd: bool = False, columns: int = 8192) -> Cost:
    """Ours, as built: the sweep and again the tiles are our kernels, then the library's two GEMMs.

    Args:
        N: tokens.
        D: hidden.
        V: vocabulary.
        jsd: a second sweep, as jsd and skew_kl need.
        columns: of a block of the backward pass; what `workspace_mb` decides.
    """
    B = min(columns, V)
    num_blocks = -(-V // B)
    # dlogits in bfloat16: written once, read by two GEMMs.
    logit_bytes = 2 + 2 + 2
    # float32 dhidden: read and written by each block. float32 dweight: written, read, stored as
    # bfloat16.
    other = 8 * N * D * num_blocks + (4 + 4 + 2) * V * D
    # dlogits (N, B) bfloat16; float32 dhidden and a block of dweight; 8 partial statistics of each
    # token in each split of 2,048 columns.
    workspace = 2 * N * B + 4 * N * D + 4 * B * D + 8 * 4 * N * -(-V // 2048)
    return _cost(
        "fdfast recompute" + (", jsd" if jsd else ""),
        (N, D, V),
        units=2,
        triton_units=6 if jsd else 4,
        logit_bytes=logit_bytes,
        other_bytes=other,
        workspace_bytes=workspace,
        note=f"{B} columns a block; any upstream gradient",
    )


def chunk(N: int, D: int, V: int, *, jsd: bool = False, tokens: int = 2048) -> Cost:
    """Ours, as built: a chunk's logits are kept as 4 bytes of each pair and become its gradients.

    Args:
        N: tokens.
        D: hidden.
        V: vocabulary.
        jsd: the pair is read once more, as jsd and skew_kl need.
        tokens: of a chunk.
    """
    R = min(tokens, N)
    num_chunks = -(-N // R)
    # The pair: written, read for the divergence and for dlogits; these in bfloat16 over it:
    # written, read by two GEMMs.
    logit_bytes = 4 + (2 if jsd else 1) * 4 + 4 + 2 + 2 + 2
    # float32 dweight: read and written by each chunk, then read and stored as bfloat16.
    other = 8 * V * D * num_chunks + (4 + 2) * V * D
    return _cost(
        "fdfast token chunk" + (", jsd" if jsd else ""),
        (N, D, V),
        units=2,
        triton_units=2,
        logit_bytes=logit_bytes,
        other_bytes=other,
        workspace_bytes=4 * R * V + 4 * V * D,
        note=f"{R} tokens a chunk; loss weights known in the forward pass",
    )


def naive(N: int, D: int, V: int) -> Cost:
    """Plain PyTorch: log_softmax and kl_div of stored logits, eager."""
    # Two bfloat16 logits: written, read by log_softmax, which writes float32.
    forward = 2 * (2 + 2 + 4)
    # exp(t); t - s; their product; its sum.
    forward += (4 + 4) + (4 + 4 + 4) + (4 + 4 + 4) + 4
    # kl_div's: exp(t) again, times the upstream gradient. log_softmax's: gradient and output read,
    # bfloat16 written. Two GEMMs read that.
    backward = (4 + 4) + (4 + 4) + (4 + 4 + 2) + (2 + 2)
    # At the peak: both logits, both log-softmaxes, the gradient of one, dlogits.
    held = 2 * 2 + 2 * 4 + 4 + 2
    return _cost(
        "naive PyTorch",
        (N, D, V),
        units=4,
        logit_bytes=forward + backward,
        workspace_bytes=float(held) * N * V,
        note="all logits stored",
    )


def liger(N: int, D: int, V: int) -> Cost:
    """Liger-Kernel 0.8.5, LigerFusedLinearJSD (ops/fused_linear_jsd.py) as it is before Blackwell:
    ceil(V / D) chunks, rounded to a power of two of tokens.
    """
    R = 1 << (-(-N // -(-V // D)) - 1).bit_length()
    R = min(R, N)
    num_chunks = -(-N // R)
    # Two float32 logits from the GEMM; each divided by the temperature; log_softmax of each;
    # softmax of the student's; the JSD kernel reads two, writes loss and gradient; the loss summed.
    logit_bytes = 2 * 4 + 2 * (4 + 4) + 2 * (4 + 4) + (4 + 4) + (2 * 4 + 2 * 4) + 4
    # The gradient's row sum; times the softmax; the difference; over the temperature; to bfloat16;
    # two GEMMs read that.
    logit_bytes += 4 + (4 + 4) + (4 + 4 + 4) + (4 + 4) + (4 + 2) + (2 + 2)
    # addmm_ reads and writes all of dweight, in bfloat16, for each chunk.
    return _cost(
        "Liger FusedLinearJSD",
        (N, D, V),
        units=4,
        logit_bytes=logit_bytes,
        other_bytes=4 * V * D * num_chunks,
        workspace_bytes=6 * 4 * R * V,  # logits, log-softmaxes, softmax and loss of a chunk
        note=f"{R} tokens a chunk (more on Blackwell); dweight summed in bfloat16",
    )


def trl(N: int, D: int, V: int, *, jsd: bool = False) -> Cost:
    """TRL 1.16.0, ChunkedDivergence (kernels/chunked_divergence.py): float32 tiles of 4,096 tokens
    and 32,768 columns, projected for the statistics, for a JSD once more, and for the gradient.
    """
    R, B = min(4096, N), min(32768, V)
    # A sweep: both tiles written by the GEMM, read by the kernel.
    sweep = 2 * 4 + 2 * 4
    # The gradient: likewise, written over the student's tile, to bfloat16, read by two GEMMs.
    gradient = sweep + 4 + (4 + 2) + (2 + 2)
    # float32 dweight for each chunk of tokens, float32 dhidden for each block of columns.
    other = 8 * V * D * -(-N // R) + 8 * N * D * -(-V // B)
    return _cost(
        "TRL ChunkedDivergence" + (", jsd" if jsd else ""),
        (N, D, V),
        units=8 if jsd else 6,
        logit_bytes=(2 if jsd else 1) * sweep + gradient,
        other_bytes=other,
        workspace_bytes=(2 * 4 + 2) * R * B + 4 * V * D,
        note=f"float32 tiles of {R} x {B}",
    )


def table(N: int, D: int, V: int, *, way: str | None = None) -> list[Cost]:
    """Every row of `fdfast kernels model`.

    Args:
        N: tokens.
        D: hidden.
        V: vocabulary.
        way: in WAYS, to leave the other of ours out; None: both.
    """
    rows = [floor(N, D, V)]
    if way in (None, "recompute"):
        rows += [recompute(N, D, V), recompute(N, D, V, jsd=True)]
    if way in (None, "chunk"):
        rows += [chunk(N, D, V), chunk(N, D, V, jsd=True)]
    return [*rows, naive(N, D, V), liger(N, D, V), trl(N, D, V), trl(N, D, V, jsd=True)]
