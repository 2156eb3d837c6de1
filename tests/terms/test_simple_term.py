"""The term of the simple joiner: its needs, and where its gradient goes."""

import pytest
import torch

from icefall_kd import JointKDLoss, ModelTap
from icefall_kd.errors import KDError
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.terms import SimpleTerm
from icefall_kd.types import Targets

Y = [[3, 4, 3], [5, 6], [7]]


@pytest.fixture
def student(make_model):
    return make_model(seed=2).eval()


@pytest.fixture
def targets(make_model, features):
    return Teacher([make_model(seed=1)], with_simple=True).targets(*features)


def forward(model, features):
    """The student's outputs of its own forward pass, with their graph."""
    with ModelTap(model, with_simple=True) as tap:
        model(x=features[0], x_lens=features[1], y=Y, prune_range=3)
        return tap.take()


def joint_of(**options):
    return JointKDLoss([SimpleTerm(0.5, **options)], 0.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_equals_its_equation(student, features, targets, temperature, naive_kd):
    said = forward(student, features)
    _, info = joint_of(temperature=temperature)(torch.zeros(()), said, targets, student)
    expected = naive_kd(
        said.simple_logits, targets.parts["simple"], targets.lens, temperature
    )
    assert info["kd_simple_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert expected > 0.1
    assert info["kd_simple_frames"] == float(targets.lens.sum()) == 27


def test_its_gradient_goes_through_simple_am_proj_and_the_encoder(
    student, features, targets
):
    said = forward(student, features)
    loss, _ = joint_of()(torch.zeros(()), said, targets, student)
    loss.backward()
    learns = {n for n, p in student.named_parameters() if p.grad is not None}
    learns = {n.split(".")[0] for n in learns}
    assert learns == {"encoder_embed", "encoder", "simple_am_proj"}
    assert student.simple_am_proj.weight.grad.abs().max() > 1e-3


def test_the_students_encoder_runs_once(student, features, targets):
    calls = []
    student.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    student.simple_am_proj.register_forward_hook(lambda *_: calls.append("simple"))
    said = forward(student, features)
    joint_of()(torch.zeros(()), said, targets, student)[0].backward()
    assert sorted(calls) == ["encoder", "simple"]


def test_a_batch_without_targets_gives_0_and_a_gradient_for_ddp(student, features):
    said = forward(student, features)
    none = torch.zeros(3, dtype=torch.int64)
    targets = Targets(none, whole=none > 0, parts={"simple": None})
    loss, info = joint_of()(torch.zeros(()), said, targets, student)
    loss.backward()
    assert info == {"kd_simple_loss": 0.0, "kd_simple_frames": 0.0}
    assert student.simple_am_proj.weight.grad.eq(0).all()


def test_a_student_without_transducer_is_refused(make_model):
    model = make_model(use_transducer=False)
    words = "`SimpleTerm.weight` is above 0 .* no transducer \\(--use-transducer 1\\)"
    with pytest.raises(KDError, match=words) as e:
        joint_of().leave_out_terms(model)
    assert "\n" not in str(e.value)


def test_a_store_that_lacks_them_is_refused(make_fingerprint):
    with pytest.raises(KDError, match="no simple targets, .* --keep-simple dense"):
        SimpleTerm().check_store(make_fingerprint(), "data/kd")
    SimpleTerm().check_store(make_fingerprint(further_kinds={"simple": "top:3"}), "kd")


def test_a_sparse_store_of_another_temperature_is_refused(make_fingerprint):
    fingerprint = make_fingerprint(further_kinds={"simple": "top:3@2"})
    with pytest.raises(KDError, match="simple targets have the form top:3@2, .* at 1"):
        SimpleTerm().check_store(fingerprint, "data/kd")
    SimpleTerm(temperature=2.0).check_store(fingerprint, "data/kd")


@pytest.mark.parametrize("temperature", [0, -1.0, "2"])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(KDError, match="temperature.*above 0"):
        SimpleTerm(temperature=temperature)


def test_teachers_of_other_tokens_are_refused(student, features, targets):
    targets.parts["simple"] = targets.parts["simple"][..., :-1]
    said = forward(student, features)
    with pytest.raises(KDError, match="simple joiner has 11 tokens .* targets have 10"):
        joint_of()(torch.zeros(()), said, targets, student)
