"""The teacher: its kinds, an average that is float32's, and LoRA's, which is of the product."""

import copy

import peft
import pytest
import torch

from fdfast.errors import InputError
from fdfast.lora import add_adapters, load_adapters, save_adapters, save_merged
from fdfast.models import hidden_states, load_model
from fdfast.teacher import KINDS, EMATeacher
from fdfast.trainer.batch import completion_tree
from tests.tiny import save_tiny_model


def drifting_student(dtype, steps):
    """A layer whose weights move a little at each of `steps` steps; yields itself after each."""
    torch.manual_seed(0)
    student = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
    for step in range(1, steps + 1):
        with torch.no_grad():
            student.weight += 0.01 * torch.randn(8, 8).to(dtype)
        yield step, student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_follows_the_formula_every_fifth_step(dtype):
    torch.manual_seed(0)
    teacher = EMATeacher(torch.nn.Linear(8, 8, bias=False, dtype=dtype), alpha=0.9, every=5)
    truth = teacher.model.weight.detach().double().clone()
    for step, student in drifting_student(dtype, 20):
        followed = teacher.step(dict(student.named_parameters()), step)
        assert followed == (step % 5 == 0)
        if followed:
            truth = 0.9 * truth + 0.1 * student.weight.detach().double()
    error = (teacher.master["weight"].double() - truth).abs().max()
    assert error < 1e-6
    assert torch.equal(teacher.model.weight, teacher.master["weight"].to(dtype))


def test_a_bfloat16_master_would_have_stalled():
    """Why the master is float32: steps below bfloat16's rounding still add up."""
    student = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    student.weight.data.fill_(1.0)
    teacher = EMATeacher(student, alpha=0.999, every=1)
    student.weight.data.fill_(1.03125)
    narrow = torch.tensor(1.0, dtype=torch.bfloat16)
    for step in range(1, 1001):
        teacher.step(dict(student.named_parameters()), step)
        narrow = narrow.lerp(student.weight.data[0, 0], 0.001)
    assert narrow == 1.0
    assert teacher.model.weight.item() > 1.01


def test_a_frozen_teacher_stays_and_keeps_no_master():
    student = torch.nn.Linear(4, 4)
    teacher = EMATeacher(student, alpha=1.0)
    before = teacher.model.weight.clone()
    student.weight.data += 1.0
    assert not teacher.step(dict(student.named_parameters()), 5)
    assert teacher.frozen
    assert not teacher.master
    assert torch.equal(teacher.model.weight, before)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_for_bit(alpha, dtype):
    torch.manual_seed(0)
    initial = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
    straight, resumed = EMATeacher(initial, alpha=alpha), EMATeacher(initial, alpha=alpha)
    for step, student in drifting_student(dtype, 20):
        straight.step(dict(student.named_parameters()), step)
        resumed.step(dict(student.named_parameters()), step)
        if step == 10:
            state = resumed.state_dict()
            weights = {k: v.clone() for k, v in state["weights"].items()}
            resumed = EMATeacher(student, alpha=alpha)
            resumed.load_state_dict(state | {"weights": weights})
    assert torch.equal(straight.model.weight, resumed.model.weight)


def test_weights_of_another_model_and_bad_settings_are_refused():
    teacher = EMATeacher(torch.nn.Linear(4, 4))
    with pytest.raises(InputError, match="the saved teacher is of another model: parameter bias"):
        teacher.load_state_dict({"weights": {"weight": torch.zeros(4, 4)}})
    with pytest.raises(InputError, match=r"alpha must lie in \[0, 1\]"):
        EMATeacher(torch.nn.Linear(4, 4), alpha=1.5)


def moved(student, step):
    """A step of a training run, in the trained weights."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(0.03 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return {n: p for n, p in student.named_parameters() if p.requires_grad}


def test_a_live_teacher_is_the_student_without_a_copy_and_always_in_eval_mode():
    student = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train()
    teacher = EMATeacher(student, kind="live")
    assert teacher.model[0].weight is student[0].weight
    assert student[0].weight.requires_grad
    assert (teacher.model.training, student.training) == (False, True)
    assert teacher.step(moved(student, 1), 1)
    assert teacher.state_dict()["weights"] == {}
    x = torch.ones(3, 4)
    assert torch.equal(teacher.model(x), student[0](x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_periodic_teacher_is_the_student_of_the_last_due_step(dtype):
    student = torch.nn.Linear(4, 4, dtype=dtype)
    teacher = EMATeacher(student, kind="periodic", every=3)
    seen = student.weight.detach().clone()
    for step in range(1, 8):
        followed = teacher.step(moved(student, step), step)
        assert followed == (step % 3 == 0)
        if followed:
            seen = student.weight.detach().clone()
        assert torch.equal(teacher.model.weight, seen)
    assert not teacher.master


def test_a_bfloat16_view_scores_beside_a_float32_master_of_a_float32_student():
    student = torch.nn.Linear(8, 8)
    teacher = EMATeacher(student, every=1, scoring_dtype="bfloat16")
    truth = student.weight.detach().double().clone()
    assert torch.equal(teacher.master["weight"].double(), truth), "not begun at a rounding"
    for step in range(1, 6):
        teacher.step(moved(student, step), step)
        truth = 0.9 * truth + 0.1 * student.weight.detach().double()
    assert teacher.master["weight"].dtype == torch.float32
    assert (teacher.master["weight"].double() - truth).abs().max() < 1e-6
    assert torch.equal(teacher.model.weight, teacher.master["weight"].bfloat16())
    assert student.weight.dtype == torch.float32


def test_many_tensors_in_chunks_are_averaged_as_in_one(monkeypatch):
    student = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(5)))
    whole, parts = EMATeacher(student, every=1), EMATeacher(student, every=1)
    weights = moved(student, 1)
    whole.step(weights, 1)
    monkeypatch.setattr("fdfast.teacher._CHUNK_ELEMENTS", 100)
    parts.step(weights, 1)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_the_student_does_not_train_is_shared_and_not_copied():
    student = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    student[0].requires_grad_(False)
    teacher = EMATeacher(student)
    assert teacher.model[0].weight is student[0].weight
    assert teacher.model[1].weight is not student[1].weight
    assert teacher.master.keys() == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"kind": "slow"}, "kind must be one of 'ema', 'frozen', 'live', 'periodic'; got 'slow'"),
        ({"scoring_dtype": "float16"}, "scoring_dtype must be one of '', 'bfloat16'"),
        ({"master_device": "cuda"}, "master_device must be one of '', 'cpu'; got 'cuda'"),
        ({"kind": "live", "scoring_dtype": "bfloat16"}, "shares weights with the student"),
    ],
)
def test_bad_settings_are_one_line(values, line):
    with pytest.raises(InputError, match=line):
        EMATeacher(torch.nn.Linear(4, 4), **values)


TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def adapted(saved, dtype="float32", **values):
    model, tokenizer = load_model(saved, dtype=dtype)
    settings = {"rank": 4, "alpha": 8.0, "target_modules": TARGETS} | values
    return add_adapters(model, **settings), tokenizer


def effective(student):
    """Weights of the adapted layers with the adapters in them, float64, by the layer's name."""
    return {
        name.removeprefix("base_model.model."): module.base_layer.weight.detach().double()
        + module.scaling["default"]
        * module.lora_B["default"].weight.detach().double()
        @ module.lora_A["default"].weight.detach().double()
        for name, module in student.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }


def test_loras_average_is_that_of_the_effective_weights_and_not_of_the_factors(saved):
    """Float32's rounding of the products against float64; the factors' average is far off."""
    student, _ = adapted(saved)
    teacher = EMATeacher(student, every=1)
    factors = EMATeacher(copy.deepcopy(student), kind="periodic", every=1)
    truth = effective(student)
    for step in range(1, 21):
        weights = moved(student, step)
        assert teacher.step(weights, step)
        for name, theta in factors.own().items():
            theta.lerp_(weights[name].detach(), 0.1)
        truth = {n: 0.9 * w + 0.1 * effective(student)[n] for n, w in truth.items()}
    apart = effective(factors.model)
    assert truth.keys() == apart.keys()
    assert len(truth) == 6
    for name, wanted in truth.items():
        layer = teacher.model.get_submodule(name)
        delta = wanted - layer.base.weight.double()
        ours = (layer.delta.double() - delta).norm() / delta.norm()
        theirs = (apart[name] - wanted).norm() / delta.norm()
        assert ours < 5e-7, name
        assert theirs > 0.1, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_teacher_shares_the_base_and_scores_as_the_student_did(saved, kind, dtype):
    student, _ = adapted(saved, dtype)
    teacher = EMATeacher(student, kind=kind, every=1)
    tree = completion_tree([[5, 6, 7]], [[8, 9, 10]])
    with torch.no_grad():
        assert torch.equal(hidden_states(teacher.model, tree), hidden_states(student, tree))
    base = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    beside = {p.data_ptr() for p in teacher.model.parameters()} - base
    assert base <= {p.data_ptr() for p in teacher.model.parameters()}
    assert len(beside) == {"ema": 6, "live": 12}.get(kind, 12)
    assert teacher.step(moved(student, 1), 1) == (kind != "frozen")
    with torch.no_grad():
        student.eval()
        same = torch.equal(hidden_states(teacher.model, tree), hidden_states(student, tree))
    assert same == (kind in ("live", "periodic"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_run_saved_and_loaded_goes_on_bit_for_bit(saved, tmp_path, kind, dtype):
    student, tokenizer = adapted(saved, dtype)
    teacher = EMATeacher(student, kind=kind, every=2)
    for step in range(1, 9):
        teacher.step(moved(student, step), step)
        if step == 5:
            save_adapters(student, tokenizer, tmp_path)
            torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    again = load_adapters(load_model(saved, dtype=dtype)[0], tmp_path)
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    assert [n for n, p in again.named_parameters() if p.requires_grad] == names
    resumed = EMATeacher(again, kind=kind, every=2)
    resumed.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    for step in range(6, 9):
        resumed.step(moved(again, step), step)
    pairs = [(student, again), (teacher.model, resumed.model)]
    for one, other in pairs:
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_the_merged_export_is_what_the_student_computes(saved, tmp_path):
    student, tokenizer = adapted(saved)
    moved(student, 1)
    save_merged(student, tokenizer, tmp_path)
    plain, _ = load_model(tmp_path)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)
        before = load_model(saved)[0](ids).logits
    assert (plain(ids).logits - before).abs().max() > 0.1


def test_adapters_that_can_not_be_averaged_are_refused(saved):
    with pytest.raises(InputError, match="no factor of a plain adapter on a linear layer below"):
        adapted(saved, target_modules=("embed_tokens",))
    with pytest.raises(InputError, match="no factor of a plain adapter on a linear layer below"):
        adapted(saved, target_modules=("q_proj", "lm_head"))
    with pytest.raises(InputError, match=r"lora_target_modules \['nowhere'\] can't be adapted"):
        adapted(saved, target_modules=("nowhere",))
    student, _ = adapted(saved, "float32")
    with pytest.raises(InputError, match="scoring_dtype must be '' for a teacher that shares"):
        EMATeacher(student, scoring_dtype="bfloat16")
