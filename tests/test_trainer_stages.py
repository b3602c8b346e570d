"""GRPO in the trainer, alone, mixed and after distillation: gradients, stages, resume."""

import dataclasses
import gc
import shutil
import weakref

import pytest
import torch

from fdfast.data.problems import Problem
from fdfast.errors import InputError
from fdfast.lean import LeanPool, Verdict
from fdfast.models import lm_head, load_model
from fdfast.rollout import Trajectory
from fdfast.teacher import EMATeacher
from fdfast.trainer import PRESETS, loop, scoring, setup, train
from fdfast.trainer.batch import Attempt
from fdfast.trainer.config_file import by_path, make_config
from fdfast.trainer.metrics import read_jsonl
from fdfast.trainer.scoring import Scorer
from fdfast.trainer.setup import make_loss
from fdfast.trainer.stages import Stage, place, total_steps
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def attempts_of(advantages=(1.2, -0.4, 0.3, -1.1, 0.0)):
    """Five attempts at two problems, of unequal lengths, one with a tool's answer in it."""
    g = torch.Generator().manual_seed(0)
    made = []
    for number, (advantage, length) in enumerate(zip(advantages, (4, 7, 1, 5, 3), strict=True)):
        ids = torch.randint(40, 200, (length,), generator=g).tolist()
        wrote = [not (number == 1 and 2 <= i < 4) for i in range(length)]
        logprobs = [-2.0 - 0.1 * i for i in range(length)]
        name = "a" if number < 3 else "b"
        prompt = [*range(50, 62), 70 if name == "a" else 71]
        seen = Trajectory(ids, logprobs, wrote, "", "stop", prompt_ids=prompt)
        teacher = [*prompt, 99, 98]
        made.append(Attempt(Problem(name, name), seen, teacher, advantage=advantage))
    return made


def config_of(**values):
    values = {"task": "lean", "distillation_weight": 0.0, "teacher_top_k": 0} | values
    return make_config(values)


def scored(model, config, attempts, reference=None):
    """Metrics and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    scorer = Scorer(config, model, model, make_loss(config, lm_head(model)), reference)
    metrics = scorer.score(attempts, backward=True)
    return metrics, {n: p.grad.clone() for n, p in model.named_parameters()}


def logprobs_of(model, prompt, trajectory, temperature=1.0):
    """Of the ids that the model wrote, in a pass of its own."""
    ids = torch.tensor([[*prompt, *trajectory.ids]])
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double() / temperature
    every = logits.log_softmax(-1)
    taken = every.gather(1, torch.tensor(trajectory.ids)[:, None])[:, 0]
    return every[torch.tensor(trajectory.wrote)], taken[torch.tensor(trajectory.wrote)]


def plain_gradient(model, attempts, config, reference=None):
    """The policy gradient at the sampling policy itself, attempt by attempt."""
    model.zero_grad(set_to_none=True)
    tokens = sum(a.completion.num_sampled for a in attempts)
    total = 0.0
    for attempt in attempts:
        seen = attempt.completion
        _, taken = logprobs_of(model, seen.prompt_ids, seen, config.rollout.temperature)
        ratio = (taken - taken.detach()).exp()
        if config.loss.importance_sampling_level == "sequence":
            ratio = (taken - taken.detach()).mean().exp().expand_as(taken)
        each = -attempt.advantage * ratio
        if reference is not None:
            with torch.no_grad():
                _, ref = logprobs_of(reference, seen.prompt_ids, seen, config.rollout.temperature)
            each = each + config.loss.beta * ((ref - taken).exp() - (ref - taken) - 1)
        if config.loss.loss_type == "grpo":
            total = total + each.mean() / len(attempts)
        elif config.loss.loss_type == "dr_grpo":
            total = total + each.sum() / (len(attempts) * config.rollout.max_completion_length)
        else:
            total = total + each.sum() / tokens
    total.backward()
    return total.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same(ours, plain):
    for name, expected in plain.items():
        bound = 2e-4 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("max_pass_tokens", [1000, 60])
def test_the_gradient_is_the_policys_whatever_the_packs(tiny, loss_type, level, max_pass_tokens):
    model, _ = load_model(tiny)
    config = config_of(
        loss_type=loss_type,
        importance_sampling_level=level,
        max_pass_tokens=max_pass_tokens,
        temperature=0.7,
    )
    metrics, ours = scored(model, config, attempts_of())
    total, plain = plain_gradient(model, attempts_of(), config)
    assert_same(ours, plain)
    assert metrics["loss"] == pytest.approx(float(total), abs=1e-5)
    assert metrics["num_tokens"] == 18


def test_the_reference_pulls_back(tiny, tmp_path):
    model, _ = load_model(tiny)
    reference, _ = load_model(tiny)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    config = config_of(beta=0.5, loss_type="grpo")
    metrics, ours = scored(model, config, attempts_of(), reference)
    _, plain = plain_gradient(model, attempts_of(), config, reference)
    assert_same(ours, plain)
    assert metrics["kl"] > 0


def test_a_stream_of_parts_is_the_same_gradient_and_refused_for_whole_sequences(tiny):
    model, _ = load_model(tiny)
    _, packed = scored(model, config_of(), attempts_of())
    _, streamed = scored(model, config_of(max_pass_tokens=8), attempts_of())
    assert_same(streamed, packed)
    with pytest.raises(InputError, match="they must fit in one pass: raise it"):
        scored(model, config_of(max_pass_tokens=8, loss_type="grpo"), attempts_of())


def test_a_pass_is_filled_by_the_device_where_nobody_says_how_far(tiny):
    """And what must stay whole may be larger than that, up to what a GPU's pass holds."""
    assert [config_of().model.pass_tokens(device) for device in ("cpu", "cuda")] == [1024, 16384]
    own = config_of(max_pass_tokens=60).model
    assert [own.pass_tokens(device) for device in ("cpu", "cuda")] == [60, 60]
    model, _ = load_model(tiny)
    attempts = []
    for number in range(3):
        ids = [40 + (7 * i + number) % 150 for i in range(400)]
        seen = Trajectory(ids, [0.0] * 400, [True] * 400, "", "stop", prompt_ids=[50, 51])
        attempts.append(Attempt(Problem("a", "a"), seen, [50, 51, 99], advantage=number - 1.0))
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        kept = scoring.hidden_states

        def noted(model, tree, **options):
            sizes.append(tree.num_tokens)
            return kept(model, tree, **options)

        patch.setattr(scoring, "hidden_states", noted)
        _, whole = scored(model, config_of(loss_type="grpo"), attempts)
        assert sizes == [3 * 402]
        _, divided = scored(model, config_of(loss_type="dapo"), attempts)
        assert sizes == [3 * 402], "this one is streamed"
    assert_same(divided, whole)  # of attempts that are equally long both losses are the same
    with pytest.raises(InputError, match="have 1206 tokens, more than max_pass_tokens = 1024"):
        scored(model, config_of(loss_type="grpo", max_pass_tokens=1024), attempts)


def test_a_mix_is_the_sum_of_both_gradients(tiny):
    model, _ = load_model(tiny)
    attempts = attempts_of()
    _, fd = scored(model, config_of(distillation_weight=1.0), attempts)
    _, grpo = scored(model, config_of(distillation_weight=0.0), attempts)
    metrics, mixed = scored(model, config_of(distillation_weight=0.25), attempts)
    assert_same(mixed, {name: 0.25 * fd[name] + 0.75 * grpo[name] for name in fd})
    assert metrics["distillation_kl"] > 0


def test_a_sampler_that_is_off_is_corrected_for_and_only_where_it_is_another(tiny):
    """Its log-probs in the attempts are far from the model's."""
    model, _ = load_model(tiny)
    metrics, _ = scored(model, config_of(), attempts_of())
    assert not any(name.startswith("sampling/") for name in metrics)
    corrected, _ = scored(model, config_of(use_vllm=True), attempts_of())
    assert corrected["sampling/sampling_logp_difference/mean"] > 0.1
    off = config_of(use_vllm=True, vllm_importance_sampling_correction=False)
    assert not any(name.startswith("sampling/") for name in scored(model, off, attempts_of())[0])


def test_places_in_the_stages():
    first = Stage(max_steps=3, prompts_per_step=2)
    second = Stage(max_steps=2, distillation_weight=0.0, learning_rate=1e-7)
    config = make_config({"stages": [first, second], "prompts_per_step": 5})
    assert total_steps(config) == 5
    seen = [place(config, step) for step in range(7)]
    assert [p.index for p in seen] == [0, 0, 0, 1, 1, 1, 1]
    assert [p.step for p in seen] == [0, 1, 2, 0, 1, 2, 3]
    assert [p.position for p in seen] == [0, 0, 0, 6, 6, 6, 6]
    assert seen[0].config.rollout.prompts_per_step == 2
    assert seen[3].config.rollout.prompts_per_step == 5
    assert (seen[0].config.optim.learning_rate, seen[3].config.optim.learning_rate) == (1e-5, 1e-7)
    assert total_steps(make_config({"max_steps": 9})) == 9
    assert place(make_config({"max_steps": 9}), 4).step == 4


def test_presets_have_the_papers_numbers():
    grpo = make_config(PRESETS["grpo_paper"])
    assert (grpo.optim.learning_rate, grpo.rollout.num_generations) == (1e-7, 5)
    assert grpo.loss.beta == 0.001
    both = make_config(PRESETS["fd_then_grpo"])
    fd, then = (place(both, step).config for step in (0, 200))
    assert (fd.optim.learning_rate, then.optim.learning_rate) == (1e-5, 1e-7)
    assert (fd.rollout.num_generations, then.rollout.num_generations) == (1, 5)
    assert (fd.loss.distillation_weight, then.loss.distillation_weight) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"task": "chat", "distillation_weight": 0.0, "feedback.source": "constant"},
            "wants data.task 'lean'",
        ),
        ({"distillation_weight": 0.5, "temperature": 0.7}, "has one temperature"),
        ({"distillation_weight": 1.5}, r"must lie in \[0, 1\]; got 1.5"),
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"loss_type": "cispo"}, "wants loss.epsilon_high"),
        ({"stages": [{"max_step": 3}]}, "stages: unknown key 'max_step'; did you mean 'max_steps'"),
        ({"stages": [{"max_steps": 0}]}, "max_steps must be at least 1; got 0"),
        ({"stages": [{"max_steps": 3, "learning_rate": -1.0}]}, "learning_rate must be positive"),
    ],
)
def test_bad_settings_are_one_line(values, line):
    with pytest.raises(InputError, match=line):
        make_config({"feedback.text": "x"} | values)


def run_settings(tiny, folder, **values):
    stages = (
        Stage(max_steps=2, learning_rate=1e-3),
        Stage(
            max_steps=3, distillation_weight=0.0, learning_rate=1e-4, num_generations=3, beta=0.1
        ),
    )
    settings = {
        "model_name_or_path": str(tiny),
        "output_dir": str(folder),
        "stages": stages,
        "prompts_per_step": 2,
        "max_completion_length": 6,
        "teacher_top_k": 0,
        "warmup_steps": 1,
        "save_steps": 0,
        "save_final_model": True,
    }
    return make_config(by_path(settings, "") | by_path(values, ""))


@pytest.fixture
def judged(monkeypatch):
    """A Lean that finds every third answer right: the model itself proves nothing."""

    def check(self, statement, proof, header=None, context=""):
        right = sum(proof.encode()) % 3 == 0
        return Verdict("proved", level=1) if right else Verdict("failed", reason="no")

    monkeypatch.setattr(LeanPool, "check", check)


def test_distillation_then_grpo_in_one_run_and_resumed_bit_for_bit(
    tiny, tmp_path, judged, monkeypatch
):
    rows = train(run_settings(tiny, tmp_path / "straight"), quiet=True)
    assert [row["stage"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e-3, 1e-4, 1e-4, 1e-4]
    assert [("time/feedback" in row) for row in rows] == [row["stage"] == 0 for row in rows]
    assert [("time/teacher" in row) for row in rows] == [row["stage"] == 0 for row in rows]
    assert "teacher_mass" in rows[0]
    assert "clip_ratio/region_mean" in rows[2]
    assert rows[2]["kl"] == pytest.approx(0.0, abs=1e-6), "the reference is the student just then"
    assert rows[4]["kl"] > 0
    feedback = {r["step"]: r["feedback"] for r in read_jsonl(tmp_path / "straight/attempts.jsonl")}
    assert feedback[1]
    assert feedback[3] == "", "nobody was asked for feedback that nobody needs"
    score = Scorer.score
    for stop in (2, 3, 4):
        calls, folder = [], tmp_path / f"stopped-{stop}"

        def failing(self, attempts, *, backward, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) == stop + 1:
                raise RuntimeError("power cut")
            return score(self, attempts, backward=backward)

        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "score", failing)
            with pytest.raises(RuntimeError, match="power cut"):
                train(run_settings(tiny, folder), quiet=True)
        again = train(run_settings(tiny, folder), resume=True, quiet=True)
        assert [r["loss"] for r in again] == [r["loss"] for r in rows]
        one, _ = load_model(folder / "model")
        other, _ = load_model(tmp_path / "straight" / "model")
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), (stop, name)


def test_the_optimizer_is_handed_over_only_where_it_is_asked_to(tiny, tmp_path, judged):
    kept = run_settings(tiny, tmp_path / "keep")
    second = dataclasses.replace(kept.stages[1], optimizer_state="keep")
    kept = dataclasses.replace(kept, stages=(kept.stages[0], second))
    losses = [r["loss"] for r in train(kept, quiet=True)]
    reset = [r["loss"] for r in train(run_settings(tiny, tmp_path / "reset"), quiet=True)]
    assert losses[:3] == reset[:3]
    assert losses[4] != reset[4]


def test_grpo_alone_makes_no_copy_of_the_model(tiny, tmp_path, judged, monkeypatch):
    made = []

    def making(*arguments, **values):
        made.append((arguments[0], teacher := EMATeacher(*arguments, **values)))
        return teacher

    monkeypatch.setattr("fdfast.trainer.setup.EMATeacher", making)
    stages = (Stage(max_steps=2, distillation_weight=0.0, num_generations=3),)
    rows = train(run_settings(tiny, tmp_path, stages=stages), quiet=True)
    assert len(rows) == 2
    [(student, teacher)] = made
    for a, b in zip(student.parameters(), teacher.model.parameters(), strict=True):
        assert a is b


def test_the_reference_of_a_stage_that_has_ended_takes_no_memory(
    tiny, tmp_path, judged, monkeypatch
):
    load, update, loaded, held = setup.load_reference, loop.update, [], []

    def loading(*args, **options):
        reference = load(*args, **options)
        loaded.append(weakref.ref(reference))
        return reference

    def updating(*args, **options):
        gc.collect()
        held.append(sum(reference() is not None for reference in loaded))
        return update(*args, **options)

    monkeypatch.setattr(setup, "load_reference", loading)
    monkeypatch.setattr(loop, "update", updating)
    stage = Stage(max_steps=1, distillation_weight=0.0, num_generations=3, beta=0.1)
    train(run_settings(tiny, tmp_path, stages=(stage, stage, stage)), quiet=True)
    assert held == [1, 1, 1]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters_distillation_then_grpo_resumed_bit_for_bit(tiny, tmp_path, judged, beta):
    """The reference of beta is the adapters as the stage found them, over the same base."""
    stages = (
        Stage(max_steps=2, learning_rate=1e-3),
        Stage(
            max_steps=3, distillation_weight=0.0, learning_rate=1e-3, num_generations=3, beta=beta
        ),
    )
    lora = {"use_peft": True, "lora_r": 4, "stages": stages, "save_steps": 1}
    rows = train(run_settings(tiny, tmp_path, **lora), quiet=True)
    if beta:
        assert rows[2]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert rows[4]["kl"] > 0
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoint-5")
    again = train(run_settings(tiny, tmp_path, **lora), resume=True, quiet=True)
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
