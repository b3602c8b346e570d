"""The REPL benchmark's own logic: its commands, its contenders, its targets and tables."""

import csv
import json
import statistics

import pytest

from benchmarks import (
    harness,
    readme,
    render,
    replio_drivers,
    replio_lean,
    replio_memory,
    replio_peers,
    replio_report,
)
from benchmarks import replio_cases as cases
from benchmarks.targets import evaluate

OWN = [c for c in cases.all_contenders() if "Lean" not in c.name and "lean" not in c.name]


def info(contender=cases.OURS, case=cases.SMALL, **fields):
    return {"case": case, "shape": "s", "contender": contender, "workers": 1, "note": ""} | fields


def test_commands_have_the_sizes_that_the_cases_say():
    texts = cases.small(2000)
    assert 190 <= statistics.mean(map(len, texts)) <= 210
    assert len(set(texts)) == len(texts)
    texts = cases.large("size=1", 3)
    assert all(0.99 * cases.IN_BYTES <= len(text) <= 1.01 * cases.IN_BYTES for text in texts)
    assert len(set(texts)) == 3


def test_answers_have_the_sizes_that_the_cases_say():
    for case in cases.all_cases()[1:]:
        done = replio_drivers.PlainLoop()
        try:
            raw = done._one({"cmd": case.make(1)[0]})
        finally:
            done.close()
        size = len(json.dumps(raw, indent=1))
        assert 0.95 * cases.OUT_BYTES <= size <= 1.5 * cases.OUT_BYTES


@pytest.mark.parametrize("contender", OWN, ids=lambda c: c.name)
def test_every_contender_without_a_package_gives_each_command_its_answer(contender):
    assert cases.wrong_contenders([contender]) == []


@pytest.mark.parametrize("data", [[], [["a"]], [["b"], ["a"]], [["a"], ["b"], ["b"]]])
def test_a_contender_that_loses_mixes_up_or_invents_answers_is_named(data):
    class Wrong:
        def run(self, texts, *, keep=False):
            return replio_drivers.Pass(1.0, 1.0, [1.0], data)

        def close(self):
            pass

    lines = cases.wrong_contenders([cases.Contender("bent", 1, Wrong)])
    assert "bent: the 8 words came back otherwise" in lines


@pytest.mark.parametrize("workers", [1, 3])
def test_the_limit_runs_every_command_once_on_all_its_workers(workers):
    texts = [f"-- fake[say=w{i}]" for i in range(20)]
    done = replio_drivers.Limit(workers).run(texts, keep=True)
    assert done.data == [[f"w{i}"] for i in range(20)]
    assert len(done.latencies_s) == 20
    assert 0 < max(done.latencies_s) <= done.wall_s
    assert done.cpu_s < 20 * done.wall_s


def test_a_peer_that_is_not_installed_says_what_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fdfast[peers]'" in replio_peers.lacking("lean-interact")


def test_every_target_names_rows_that_there_are():
    there = {(case.name, c.name) for case in cases.all_cases() for c in cases.all_contenders()}
    there |= {(cases.MEMORY, cases.OURS), (cases.LEAN, cases.OURS)}
    there.add((cases.LEAN, cases.LEAN_PROCESSES))
    for target in cases.TARGETS:
        assert (target.case, target.contender) in there
        assert not target.rival or (target.case, target.rival) in there


def test_cpu_seconds_of_a_rival_that_takes_no_time_off_its_workers():
    (target,) = (t for t in cases.TARGETS if t.contender == cases.OURS_BATCH and t.at_most == 2.0)
    rows = replio_report.summarize(
        [
            {"extra_info": info(cases.OURS_BATCH, cpu_s=0.003, wall_s=1.0)},
            {"extra_info": info(cases.LIMIT_ONE, cpu_s=0.002, wall_s=9.0)},
        ],
        "cpu",
    )
    (verdict,) = evaluate(rows, [target])
    assert verdict.measured == pytest.approx(1.5)
    assert verdict.outcome == "met"


def test_rows_are_medians_and_a_lacking_peer_has_one_without_numbers(tmp_path):
    seen = [info(per_s=n, wall_s=n, cpu_s=n, p50_us=n, p99_us=n) for n in (3.0, 1.0, 2.0)]
    seen.append(info("LeanInteract server") | {"note": "cannot: why"})
    rows = replio_report.summarize([{"extra_info": i} for i in seen] + [{"extra_info": {}}], "cpu")
    assert list(rows[0]) == list(replio_report.COLUMNS)
    assert (rows[0]["turns"], rows[0]["per_s"], rows[0]["cpu_s"]) == (3, 2.0, 2.0)
    assert (rows[1]["turns"], rows[1]["cpu_s"], rows[1]["note"]) == ("", "", "cannot: why")
    assert "cannot: why" in render.table(rows, replio_report.COLUMNS)
    render.add_targets(rows, evaluate(rows, cases.TARGETS))
    harness.save(rows, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        text = readme.bench(list(csv.DictReader(file)))
    assert "| ours | 1 | 3 | 2.0 | 2.0 | 2.0 | 2.0 |" in text


def test_the_memory_of_the_parent_is_measured_over_all_commands():
    found = replio_memory.measure(3000)
    assert 0 <= found["grown_mib"] < 20
    assert 0 < found["cpu_s"] <= 3 * found["wall_s"]


def test_every_turn_proves_other_statements_with_texts_of_its_own():
    first, second = (replio_lean.attempts(2, turn) for turn in (0, 1))
    assert len(set(first)) == len(first) == 2 * replio_lean.ATTEMPTS
    assert not {i.formal_statement for i in first} & {i.formal_statement for i in second}


def test_a_process_for_each_run_tells_right_proofs_from_wrong_ones():
    right = replio_lean.attempts(1, 0)[0]
    wrong = right._replace(proof="nonsense")
    for check in (replio_lean.both_walls, replio_lean.messages_alone):
        assert [check(right), check(wrong)] == [True, False]
