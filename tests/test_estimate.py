"""The dry run's numbers against models that are really there, and the paper's arithmetic."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3MoeConfig

from fdfast.errors import InputError, MachineError
from fdfast.models import load_model
from fdfast.trainer import load_config
from fdfast.trainer.dry_run import advice, not_modelled, table, workloads
from fdfast.trainer.estimate import (
    GIB,
    MEMORY_GIB,
    STATES,
    Workload,
    activation_bytes,
    estimate,
    read_shape,
    shape_of,
)
from tests.tiny import save_tiny_model

QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
PAPER = Workload(128, 1, 450, 8192, use_vllm=True, generation_batch_size=64)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen3", False)])
def test_parameters_are_those_of_the_loaded_model(kind, tied, tmp_path):
    folder = save_tiny_model(tmp_path / "m", kind=kind, tied=tied)
    model, _ = load_model(folder)
    shape = read_shape(str(folder))
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    table_size = 0 if tied else model.get_input_embeddings().weight.numel()
    assert shape.num_active == shape.num_parameters - table_size
    assert (shape.query, shape.key_value, shape.vocabulary) == (128, 64, 384)
    assert read_shape(str(folder / "config.json")) == replace(
        shape, name=str(folder / "config.json")
    )


def test_of_a_mixture_of_experts_a_token_passes_through_the_chosen_ones():
    config = Qwen3MoeConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=24, intermediate_size=48,
    )  # fmt: skip
    shape = shape_of(config)
    idle = 2 * 6 * 3 * 32 * 24  # layers, experts that are not chosen, their three matrices
    table_size = 0 if config.tie_word_embeddings else 100 * 32
    assert shape.num_active == shape.num_parameters - idle - table_size
    assert shape.intermediate == 48


def test_the_papers_step_is_its_23_seconds_of_arithmetic():
    """Qwen3-8B, 128 attempts of 8,192 tokens, 8 x H200 at 40 %: paper.md reckons about 23 s."""
    found = estimate(shape_of(QWEN3_8B), PAPER, gpu="h200", gpus=8)
    assert 20 < found.arithmetic_s < 28
    assert found.arithmetic_s == found.seconds["student"] + found.seconds["teacher"]


def test_what_is_kept_for_the_backward_pass_is_what_torch_keeps(monkeypatch):
    """Every tensor that autograd saves in a real pass, each storage once; within 1.25. The pass has
    no hooks of its own (`made_again`), behind which those here would see nothing.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fdfast import model_attention
    from fdfast.models import hidden_states
    from fdfast.packing import PrefixTree

    monkeypatch.setattr(model_attention, "made_again", contextlib.nullcontext)
    config = LlamaConfig(
        vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        tree = PrefixTree.from_sequences([torch.randint(3, 512, (256,)).tolist()])
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(saved, kept=kept, weights=weights):
            if (place := saved.untyped_storage().data_ptr()) not in weights:
                kept[place] = saved
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            hidden = hidden_states(model, tree)
        seen = sum(t.untyped_storage().nbytes() for t in kept.values()) / 256
        assert hidden.requires_grad
        modelled = activation_bytes(shape_of(config), dtype)
        assert 1 / 1.25 < modelled / seen < 1.25, (dtype, modelled, seen)


_STEP = """
import json, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from fdfast.losses import FeedbackDistillationLoss
from fdfast.models import hidden_states
from fdfast.packing import PrefixTree
from fdfast.teacher import EMATeacher
from fdfast.topk_head import topk_head
from fdfast.types import TeacherTopK

def peak():  # ru_maxrss would begin at that of the process which started this one
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def step(config, tokens, passes):
    model = AutoModelForCausalLM.from_config(config)
    teacher = EMATeacher(model)
    optimizer = torch.optim.AdamW(model.parameters())
    tree = PrefixTree.from_sequences([torch.randint(3, 512, (tokens,)).tolist()])
    for _ in range(2):  # the first makes Adam's moments
        optimizer.zero_grad()
        for _ in range(passes):
            with torch.no_grad():
                top = topk_head(hidden_states(teacher.model, tree),
                                teacher.model.lm_head.weight, 25, workspace_mb=20)
            loss = FeedbackDistillationLoss(workspace_mb=20)(
                hidden_states(model, tree), model.lm_head.weight, tree.target_ids,
                TeacherTopK(top.ids, top.logprobs))
            loss.loss.backward()
            del loss
        optimizer.step()

small = dict(vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=1, num_key_value_heads=1)
step(LlamaConfig(**small), 8, 1)
before = peak()
config = LlamaConfig(**json.loads(sys.argv[1]))
step(config, int(sys.argv[2]), 2)
print(peak() - before)
"""


def test_the_memory_of_a_real_step_is_the_modelled_one():
    """A whole FD step of 34 M parameters on the CPU, in a process of its own; within 1.3."""
    from transformers import LlamaConfig

    values = {
        "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _STEP, json.dumps(values), "512"],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    work = Workload(
        1, 1, 1, 511, feedback_tokens=0, max_pass_tokens=512, dtype="float32", workspace_mb=20
    )
    found = estimate(shape_of(LlamaConfig(**values)), work, gpu="h100")
    assert 1 / 1.3 < found.update_bytes / int(done.stdout) < 1.3, (
        found.update_bytes / 2**20,
        int(done.stdout) / 2**20,
    )


def test_states_are_shared_out_and_each_setting_does_what_it_says():
    shape = shape_of(QWEN3_8B)

    def memory(gpus=8, **changes):
        return estimate(shape, replace(PAPER, **changes), gpu="h200", gpus=gpus)

    whole, P = memory(), shape.num_parameters
    assert sum(whole.memory_bytes[n] for n in STATES if n in whole.memory_bytes) == pytest.approx(
        (2 + 4 + 8 + 2 + 4) * P / 8
    )
    assert memory(gpus=16).memory_bytes["Adam"] == whole.memory_bytes["Adam"] / 2
    assert "teacher master" not in memory(teacher_copies=False).memory_bytes
    assert memory(max_pass_tokens=8192).memory_bytes["activations"] == pytest.approx(
        whole.memory_bytes["activations"] / 2
    )
    checked = memory(gradient_checkpointing=True)
    assert checked.memory_bytes["activations"] < 0.1 * whole.memory_bytes["activations"]
    assert checked.seconds["student"] > whole.seconds["student"]
    away = memory(activation_offloading=True)
    assert away.memory_bytes["activations"] == pytest.approx(
        whole.memory_bytes["activations"] / QWEN3_8B.num_hidden_layers
    )
    grpo = memory(distillation_weight=0.0, beta=0.001, num_generations=5)
    assert "reference" in grpo.memory_bytes
    assert "teacher" not in grpo.seconds
    asleep = memory(vllm_enable_sleep_mode=True)
    share = whole.memory_bytes["vLLM's share"]
    assert whole.update_bytes - asleep.update_bytes == pytest.approx(share)
    assert memory(feedback="llm").seconds["feedback"] == 80.0
    assert memory(feedback="self").seconds["feedback"] > 0
    narrower = memory(use_vllm=False)
    assert narrower.memory_bytes["KV cache of rollouts"] == 16 * 8642 * 2 * 1024 * 36 * 2


@pytest.mark.parametrize(
    ("words", "bytes_of"),
    [
        ([], {"teacher": 2, "teacher master": 4}),
        (["teacher.kind=frozen"], {"teacher": 2}),
        (["teacher.kind=periodic"], {"teacher": 2}),
        (["teacher.alpha=1"], {"teacher": 2}),
        (["teacher.kind=live"], {}),
        (["teacher.master_device=cpu"], {"teacher": 2}),
        (["dtype=float32"], {"teacher": 4}),
        (["dtype=float32", "scoring_dtype=bfloat16"], {"teacher": 2, "teacher master": 4}),
        (["distillation_weight=0"], {}),
        (["max_staleness=1"], {"teacher": 2, "teacher master": 4, "copy to sample from": 2}),
        (["max_staleness=1", "use_vllm=true"], {"teacher": 2, "teacher master": 4}),
    ],
)
def test_the_settings_of_teacher_and_sampling_are_in_the_memory(words, bytes_of):
    """As EMATeacher and initial_state keep them: test_teacher.py has the former."""
    shape = shape_of(QWEN3_8B)
    config = load_config(None, ["dtype=bfloat16", *words])
    found = estimate(shape, workloads(config)[0][1], gpu="h200").memory_bytes
    parts = ("teacher", "teacher master", "copy to sample from")
    assert {n: found[n] / shape.num_parameters for n in parts if n in found} == bytes_of


def test_the_copy_that_samples_is_there_during_the_update_too():
    """Of sharded weights it is whole on every GPU, for as long as the run is."""
    shape, work = shape_of(QWEN3_8B), replace(PAPER, use_vllm=False)
    found = estimate(shape, work, gpu="h200", gpus=8)
    rest = replace(PAPER, vllm_enable_sleep_mode=True)
    without = estimate(shape, rest, gpu="h200", gpus=8)
    assert found.update_bytes - without.update_bytes == 2 * shape.num_parameters
    huge = replace(shape, num_parameters=80 * 10**9)
    said = advice(huge, work, estimate(huge, work, gpu="h200", gpus=64), gpu="h200", gpus=64)
    assert said.endswith("the copy that samples is too much for one GPU: set use_vllm=true")


def test_what_the_numbers_leave_out_is_said():
    assert not_modelled(load_config(None, [])) == []
    words = ["use_peft=true", "max_staleness=1", "ray.address=auto", "feedback.source=self"]
    said = not_modelled(load_config(None, words))
    assert len(said) == 4
    assert all(line.startswith("NOT modelled: ") for line in said)


def test_what_does_not_fit_is_told_what_to_lower_and_then_fits():
    shape = shape_of(QWEN3_8B)

    def said(gpus, **changes):
        work = replace(PAPER, **changes)
        found = estimate(shape, work, gpu="h200", gpus=gpus)
        return advice(shape, work, found, gpu="h200", gpus=gpus)

    assert "set vllm_enable_sleep_mode=true and lower max_pass_tokens to" in said(8)
    lower = int(said(8).split("lower max_pass_tokens to ")[1].split(",")[0])
    assert said(8, vllm_enable_sleep_mode=True, max_pass_tokens=lower).startswith("fits: ")
    assert not said(8, vllm_enable_sleep_mode=True, max_pass_tokens=lower + 512).startswith("fits")
    assert "weights and optimizer alone are too much: take 2 GPUs" in said(1)
    assert "in the rollout; lower generation_batch_size" in said(
        8, use_vllm=False, generation_batch_size=512, prompts_per_step=8192
    )


def test_the_table_marks_every_number_and_says_what_is_assumed():
    printed = table(shape_of(QWEN3_8B), [("fd", PAPER)], gpu="h200", gpus=8)
    body = [line for line in printed.splitlines() if line.startswith("  ") and line[-1].isdigit()]
    assert body == []
    assert printed.count("modelled") > 12
    assert "assumed: passes hold 40% of the peak" in printed
    assert all(len(line) <= 125 for line in printed.splitlines())


def test_what_can_not_be_modelled_is_one_line(tmp_path):
    shape = shape_of(QWEN3_8B)
    with pytest.raises(InputError, match=r"--gpu must be one of .*h200.*; got 'tpu'"):
        estimate(shape, PAPER, gpu="tpu")
    with pytest.raises(InputError, match="--gpus must be at least 1; got 0"):
        estimate(shape, PAPER, gpu="h200", gpus=0)
    (tmp_path / "config.json").write_text('{"model_type": "none-such"}')
    with pytest.raises(InputError, match="is no model's configuration") as caught:
        read_shape(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(MachineError, match="no configuration was found") as caught:
        read_shape(str(tmp_path / "none"))
    assert "\n" not in str(caught.value)
    assert MEMORY_GIB["h200"] * GIB > 140e9
