"""The student's joiner at nodes: asked once for all losses, and where it is needed."""

from collections import Counter

import pytest
import torch
from joiner_cases import NAN, case, value_and_grads

from icefall_kd.errors import KDError
from icefall_kd.losses.transducer import FORMS, nodes_kd_loss


def test_several_losses_evaluate_the_joiner_once():
    c, calls = case(), Counter()
    for name, module in c.joiner.named_children():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    student = c.student()
    values = [nodes_kd_loss(student, form=form) for form in FORMS]
    assert calls == {"encoder_proj": 1, "decoder_proj": 1}  # no logits yet
    student.logits()
    again = [nodes_kd_loss(student, form=form) for form in FORMS[:3]]
    assert student.logits() is student.logits()
    assert set(calls.values()) == {1} and len(calls) == 3
    torch.testing.assert_close(again, values[:3])


@pytest.mark.parametrize("made", [True, False])
def test_logits_and_fused_layer_give_one_gradient(made):
    c = case()
    student = c.student()
    if made:
        student.logits()
    weights = c.nodes.occupancy
    found = value_and_grads(
        student.kl(c.nodes.teacher, temperature=2.0, weights=weights), c.inputs
    )
    torch.testing.assert_close(found, value_and_grads(c.loss("nodes", 2.0), c.inputs))


@pytest.mark.parametrize("asked", ["nothing", "states", "logits"])
def test_a_selection_is_the_student_at_these_nodes(asked):
    c, index = case(), torch.tensor([4, 0, 2])
    student = c.student()
    if asked != "nothing":
        assert len(student.states) == len(c.nodes)
    if asked == "logits":
        student.logits()
    some = student.select(index)
    torch.testing.assert_close(some.logits(), c.student().logits()[index])
    assert torch.equal(some.nodes.teacher, c.nodes.teacher[index])
    assert len(student.nodes) == len(c.nodes)


def test_the_joiner_is_asked_at_the_drawn_nodes_alone():
    c = case()
    student, some = c.student(), []
    select = student.select
    student.select = lambda index: some.append(select(index)) or some[0]
    nodes_kd_loss(student, form="sampled_u").backward()
    frames = set(zip(c.nodes.row.tolist(), c.nodes.frame.tolist()))
    assert len(some[0].states) == len(frames) < len(c.nodes)
    assert student._states is None
    drawn = zip(some[0].nodes.row.tolist(), some[0].nodes.frame.tolist())
    assert sorted(drawn) == sorted(frames)


def test_nan_in_logits_is_refused_by_name():
    c = case()
    with torch.no_grad():
        c.joiner.output_linear.bias[2] = NAN
    with pytest.raises(KDError, match=rf"joiner logits of shape \({len(c.nodes)}, 6\)"):
        c.student().logits()
