"""The EMA teacher: its average is float32's, whatever the dtype of the weights."""

import pytest
import torch

from fdfast.errors import InputError
from fdfast.teacher import EMATeacher


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
