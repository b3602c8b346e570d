"""`fdfast demo`: Feedback Distillation on a real model with real Lean, in minutes on two cores.

Two runs of the trainer, each with its checks, and one page that shows them:
(a) feedback into weights: a constant feedback, "be concise", to a frozen teacher; the student,
which never sees it,
    comes to answer as if it had (arXiv 2605.30861);
(b) proofs: the theorem set of fdfast, Lean's verdict on every attempt, its words as the feedback.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fdfast.evaluation.plots import Curve, Panel, plot_run
from fdfast.evaluation.report import Section, write_report
from fdfast.files import atomic_file
from fdfast.trainer import PRESETS, train
from fdfast.trainer.config_file import make_config
from fdfast.trainer.metrics import read_jsonl

UNSEEN = "unseen {}, same seed"


@dataclass(frozen=True)
class Check:
    """One claim of the demo and whether it held."""

    claim: str
    seen: str
    held: bool


def demo(output: Path, *, resume: bool = False) -> int:
    """Run both parts into `output`, or, if a demo is there already, into the next free `output-2`,
    ...

    Args:
        output: the folder.
        resume: go on with the demo in `output` that was interrupted.

    Returns:
        0 if all checks held, else 1.
    """
    folder = output if resume else _free(output)
    started = time.perf_counter()
    print(f"demo: two short runs into {folder}; after Ctrl-C go on with")
    print(f"      fdfast demo --resume --output {folder}")
    print("\n(a) feedback into weights: the teacher is told to be concise, the student is not")
    concise = _run("demo_concise", folder / "concise")
    concise_checks = _concise_checks(concise)
    print("\n(b) proofs: Lean judges every attempt, the teacher reads what it said")
    lean = _run("demo_lean", folder / "lean")
    lean_checks = _lean_checks(lean)
    sections = [
        _concise_section(folder, concise, concise_checks),
        _answers(folder / "concise"),
        _lean_section(folder, lean, lean_checks),
        _proofs(folder / "lean"),
    ]
    minutes = (time.perf_counter() - started) / 60
    checks = concise_checks + lean_checks
    summary = {"checks": [asdict(c) for c in checks], "machine": _machine(minutes)}
    with atomic_file(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2), encoding="utf-8")
    page = write_report(
        folder / "report.html", "Feedback Distillation, a demo", sections, _machine(minutes)
    )
    print("\n" + _table(checks))
    print(f"\nreport: {page} (open it in a browser; plots: {folder}/*.png)")
    print(_machine(minutes))
    return 0 if all(check.held for check in checks) else 1


def _free(output: Path) -> Path:
    """`output`, or the first of output-2, output-3, ... that is not there: an earlier demo is never
    touched.
    """
    folder, number = output, 1
    while folder.exists():
        number += 1
        folder = output.with_name(f"{output.name}-{number}")
    return folder


def _run(preset: str, folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, which is done, gone on with or begun, as the folder has it."""
    config = make_config(PRESETS[preset] | {"output_dir": str(folder)})
    rows = read_jsonl(folder / "metrics.jsonl")
    if any(r["step"] == config.optim.max_steps and "eval_loss" in r for r in rows):
        return rows
    return train(config, resume=bool(rows))


def _evaluations(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Before the first step and after the last."""
    found = [r for r in rows if "eval_loss" in r]
    return found[0], found[-1]


def _concise_checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    before, after = _evaluations(rows)
    kl = before["eval_kl"], after["eval_kl"]
    length = before["eval_completions/mean_length"], after["eval_completions/mean_length"]
    capped = "at least " if before["eval_completions/clipped_ratio"] > 0 else ""
    return [
        Check(
            "KL(teacher || student) on questions it never trained on falls at least 5x",
            f"{kl[0]:.3f} -> {kl[1]:.3f} ({kl[0] / kl[1]:.1f}x)",
            kl[0] >= 5 * kl[1],
        ),
        Check(
            "answers to them get shorter, as the teacher alone was asked",
            f"{capped}{length[0]:.1f} -> {length[1]:.1f} tokens",
            length[1] <= 0.75 * length[0],
        ),
    ]


def _lean_checks(rows: Sequence[dict[str, Any]]) -> list[Check]:
    steps = [r for r in rows if "grad_norm" in r]
    kinds = {k.removeprefix("verdicts/") for r in steps for k in r if k.startswith("verdicts/")}
    shares = {k: sum(r.get(f"verdicts/{k}", 0.0) for r in steps) / len(steps) for k in kinds}
    before, after = _evaluations(rows)
    return [
        Check(
            "Lean judged every attempt; some are proofs by the kernel's word, some are not",
            ", ".join(f"{share:.0%} {kind}" for kind, share in sorted(shares.items())),
            shares.get("proved", 0) > 0 and shares.get("failed", 0) > 0,
        ),
        Check(
            "the feedback moves the teacher, and the loss moves the student, at every step",
            f"KL {steps[0]['kl']:.3f} -> {steps[-1]['kl']:.3f}; "
            f"proved, unseen theorems: {before['eval_reward']:.0%} -> {after['eval_reward']:.0%}",
            all(r["kl"] > 0 and r["grad_norm"] > 0 for r in steps),
        ),
    ]


def _concise_section(
    folder: Path, rows: Sequence[dict[str, Any]], checks: Sequence[Check]
) -> Section:
    panels = [
        Panel(
            "KL(teacher || student)",
            "nats a token",
            [Curve("questions trained on", "kl", UNSEEN.format("questions"), "eval_kl")],
        ),
        Panel(
            "Length of an answer",
            "tokens",
            [
                Curve(
                    "questions trained on",
                    "completions/mean_length",
                    UNSEEN.format("questions"),
                    "eval_completions/mean_length",
                )
            ],
        ),
    ]
    figure = plot_run(rows, panels, folder / "concise.png")
    return Section(
        "(a) Feedback into weights",
        "The teacher is the untouched model with 'Be concise' in its prompt; the student sees the "
        "bare question. Training on its own answers moves the feedback from the prompt into the "
        "student's weights.",
        ("claim", "seen", ""),
        [(c.claim, c.seen, "held" if c.held else "broken") for c in checks],
        [figure],
    )


def _lean_section(folder: Path, rows: Sequence[dict[str, Any]], checks: Sequence[Check]) -> Section:
    label, unseen = "theorems trained on", UNSEEN.format("theorems")
    panels = [
        Panel(
            "Attempts that Lean accepts", "share", [Curve(label, "reward", unseen, "eval_reward")]
        ),
        Panel("KL(teacher || student)", "nats a token", [Curve(label, "kl", unseen, "eval_kl")]),
    ]
    figure = plot_run(rows, panels, folder / "lean.png")
    return Section(
        "(b) Proofs, judged by Lean",
        "Each attempt is a term for a theorem of the base set; the embedded Lean 4 checks it, and "
        "the teacher's prompt carries what Lean said. A few steps show that the line works; they "
        "are too few to make a prover.",
        ("claim", "seen", ""),
        [(c.claim, c.seen, "held" if c.held else "broken") for c in checks],
        [figure],
    )


def _answers(folder: Path, count: int = 4) -> Section:
    """The first unseen questions with the answers of before and after."""
    seen: dict[str, dict[int, str]] = {}
    for row in read_jsonl(folder / "attempts.jsonl"):
        if row.get("evaluation"):
            seen.setdefault(row["problem"], {}).setdefault(row["step"], row["completion"])
    rows = [(name, at[min(at)], at[max(at)]) for name, at in list(seen.items())[:count]]
    return Section("Answers to unseen questions", "", ("question", "before", "after"), rows)


def _proofs(folder: Path, count: int = 10) -> Section:
    """Attempts of the training steps, proofs first."""
    attempts = [r for r in read_jsonl(folder / "attempts.jsonl") if not r.get("evaluation")]
    attempts.sort(key=lambda r: r["verdict"]["kind"] != "proved")
    rows = [(r["problem"], r["completion"].strip(), r["verdict"]["kind"]) for r in attempts[:count]]
    return Section("Attempts", "", ("theorem", "attempt", "verdict"), rows)


def _table(checks: Sequence[Check]) -> str:
    rows = [(c.claim, c.seen, "held" if c.held else "BROKEN") for c in checks]
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def _machine(minutes: float) -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return (
        f"{minutes:.1f} minutes on {model}, {torch.get_num_threads()} thread(s); "
        f"torch {torch.__version__}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}"
    )
