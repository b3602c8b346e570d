"""The cases of the benchmark: what is computed, on what, by whom; the same for the CPU and CUDA."""

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import contenders as c
from benchmarks import peers
from benchmarks.contenders import Contender, Limit
from benchmarks.data import Inputs, is_real, make_inputs
from benchmarks.shapes import QWEN3_8B, SMOLLM2_135M, Shape

DEVICES = ("cpu", "cuda")
# Units of 2NDV operations that any exact loss needs: logits (of both), dhidden, dweight.
UNITS = {"forward KL": 4, "GRPO": 3}
CHECKED = Shape("check", 64, 64, 1032)  # what every contender must get right before any is timed
KLS = (0.3, 0.05, 0.001, 0.0001)
GROWTH_V = (49152, 151936)
ERROR_TOKENS = {"timed": 128, "accuracy": 256}  # float64 takes long
PLAIN, FILTERED = "ours", "ours, filter {}"
LOGPROBS_ALONE = partial(c.naive_grpo, entropy_coef=0.0)  # what peers without entropy compute
# Beside the default: what the memory targets are for; on a GPU, what holds the token-chunk way.
OTHER_WORKSPACE_MB = {"cpu": 64.0, "cuda": 4096.0}
WORKSPACE = "ours, workspace {:.0f} MiB"
SMALL = WORKSPACE.format(OTHER_WORKSPACE_MB["cpu"])


@dataclass(frozen=True)
class Case:
    """One loss in one dtype on one shape.

    Attributes:
        kind: timed, accuracy (errors alone) or growth (memory alone).
        loss: a name in UNITS.
        dtype: of hidden and weight, as torch calls it.
        shape: N, D, V.
        device: cpu or cuda.
        turns: passes of each contender.
        mean_kl: between teacher and student; None: as the pair comes.
    """

    kind: str
    loss: str
    dtype: str
    shape: Shape
    device: str
    turns: int = 1
    mean_kl: float | None = None

    @property
    def name(self) -> str:
        """In the tables; unique."""
        about = {
            "timed": "",
            "accuracy": f", mean KL {self.mean_kl}",
            "growth": f", memory at V = {self.shape.V}",
        }
        return f"{self.loss}, {self.dtype}{about[self.kind]}"

    @property
    def data(self) -> str:
        """Where the inputs come from."""
        return "real" if is_real(self.shape) else "drawn"

    @property
    def has_kl(self) -> bool:
        """Whether the distance of student and teacher matters to its numbers."""
        return self.loss == "forward KL" and self.kind != "growth"

    def inputs(self, shape: Shape | None = None) -> Inputs:
        """The inputs, of this case's shape or another."""
        dtype = getattr(torch, self.dtype)
        return make_inputs(shape or self.shape, dtype, self.device, mean_kl=self.mean_kl)

    def contenders(self) -> list[Contender]:
        """Who computes this case."""
        if self.kind == "growth":
            return [self._with_other_workspace()]
        made = self._kl() if self.loss == "forward KL" else self._grpo()
        if self.kind == "accuracy":
            keep = (PLAIN, FILTERED.format(0.03), "naive PyTorch", "Liger-Kernel", "TRL")
            return [contender for contender in made if contender.name in keep]
        return made

    def limits(self) -> list[Limit]:
        """The GEMMs alone, by every library there is for this dtype."""
        dual = self.loss == "forward KL"
        if self.kind != "timed":
            return []
        if self.device == "cuda":
            return [Limit("limit: GEMMs by cuBLAS", dual)]
        if self.dtype == "float32":
            return [
                Limit("limit: GEMMs by MKL", dual),
                Limit("limit: GEMMs by oneDNN", dual, onednn=True),
            ]
        return [
            Limit("limit: GEMMs in bfloat16", dual),
            Limit("limit: GEMMs in float32 by oneDNN", dual, onednn=True, wide=True),
        ]

    def _tolerance(self, float32: float, bfloat16: float) -> float:
        return float32 if self.dtype == "float32" else bfloat16

    def _ours(self, name: str, **options: float) -> Contender:
        kl = self.loss == "forward KL"
        loss = c.recompute_kl if name == "ours, recompute" else c.ours_kl if kl else c.ours_grpo
        tolerance = self._tolerance(1e-4, 5e-3) + options.get("grad_filter", 0.0)
        backend = "fdfast triton" if self.device == "cuda" else "fdfast cpu"
        truth = c.true_kl if kl else c.naive_grpo
        return Contender(name, partial(loss, **options), truth, backend, tolerance)

    def _all_of_ours(self) -> list[Contender]:
        return [
            self._ours(PLAIN),
            *(self._ours(FILTERED.format(f), grad_filter=f) for f in (0.03, 0.1)),
            self._with_other_workspace(),
        ]

    def _with_other_workspace(self) -> Contender:
        mb = OTHER_WORKSPACE_MB[self.device]
        return self._ours(WORKSPACE.format(mb), workspace_mb=mb)

    def _peer(
        self, name: str, loss: c.Loss, truth: c.Loss, package: str, **more: bool
    ) -> Contender:
        lacks = peers.lacking(package)
        return Contender(
            name, loss, truth, package, self._tolerance(1e-3, 0.3), lacks=lacks, **more
        )

    def _torch(self, naive: c.Loss, truth: c.Loss) -> list[Contender]:
        tolerance = self._tolerance(1e-4, 0.3)
        return [
            Contender("naive PyTorch", naive, truth, "torch", tolerance),
            Contender(
                "torch.compile",
                partial(c.by_compiler, naive),
                truth,
                "torch",
                tolerance,
                compiled=True,
                fewer_turns=True,
            ),
        ]

    def _kl(self) -> list[Contender]:
        return [
            *self._all_of_ours(),
            self._ours("ours, recompute"),
            *self._torch(c.naive_kl, c.true_kl),
            self._peer("Liger-Kernel", peers.liger_kl, c.true_kl, "liger-kernel", compiled=True),
            self._peer("TRL", peers.trl_kl, c.true_kl, "trl", fewer_turns=True),
        ]

    def _grpo(self) -> list[Contender]:
        plain, cce = LOGPROBS_ALONE, "cut-cross-entropy"
        return [
            *self._all_of_ours(),
            *self._torch(c.naive_grpo, c.naive_grpo),
            self._peer(
                "Liger-Kernel (no entropy)", peers.liger_grpo, plain, "liger-kernel", compiled=True
            ),
            self._peer(
                "TRL (entropy without gradient)", peers.trl_grpo, plain, "trl", fewer_turns=True
            ),
            Contender(
                f"{cce} (no entropy)",
                partial(peers.cce_grpo, impl="cce"),
                plain,
                cce,
                # It leaves out gradients below 2^-12.
                self._tolerance(0.1, 0.3),
                lacks=peers.lacking(cce, cuda_only=True, device=self.device),
            ),
            self._peer(
                f"{cce}, torch_compile (no entropy)",
                partial(peers.cce_grpo, impl="torch_compile"),
                plain,
                cce,
                compiled=True,
                fewer_turns=True,
            ),
        ]


def all_cases(device: str, *, quick: bool = False, memory_bytes: int = 0) -> list[Case]:
    """Every case of a device, in the order in which they run.

    Args:
        device: cpu or cuda.
        quick: few tokens and one turn, to try the benchmark itself.
        memory_bytes: of the GPU.
    """
    if device == "cuda":
        shape, dtypes, turns = QWEN3_8B.fitting(memory_bytes), ("bfloat16",), 10
    else:
        shape, dtypes, turns = SMOLLM2_135M, ("float32", "bfloat16"), 3
    few = shape._replace(N=ERROR_TOKENS["accuracy"])
    grown = [Shape("drawn head", 512, shape.D, V) for V in GROWTH_V]
    if quick:
        shape, few, turns = shape._replace(N=512), few._replace(N=64), 1
        grown = [g._replace(N=128) for g in grown]
    timed = [Case("timed", "forward KL", dtype, shape, device, turns) for dtype in dtypes]
    timed.append(Case("timed", "GRPO", dtypes[0], shape, device, turns))
    near = [Case("accuracy", "forward KL", "bfloat16", few, device, mean_kl=kl) for kl in KLS]
    growth = [Case("growth", t.loss, t.dtype, g, device) for t in timed for g in grown]
    return [*timed, *near, *growth]
