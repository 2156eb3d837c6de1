"""What the losses of transducer KD refuse, by name."""

from dataclasses import replace

import pytest
import torch
from joiner_cases import ALL, NAN, case

from icefall_kd.errors import KDError
from icefall_kd.losses.transducer import total_kd_loss
from icefall_kd.types import SparseDistribution


def refused(match, c, form="nodes", **options):
    with pytest.raises(KDError, match=match) as e:
        c.loss(form, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("form", ["mean_u", "total"])
def test_a_sparse_teacher_has_no_mean_of_logits(form):
    c = case()
    kept = SparseDistribution(
        c.nodes.label.clamp(min=0)[:, None],
        torch.full((len(c.nodes), 1), -1.0),
        torch.full((len(c.nodes),), -0.4),
    )
    c = replace(c, nodes=replace(c.nodes, teacher=kept))
    refused(f"form {form} .* has 1 a node: store it as dense", c, form)


def test_total_refuses_ctc_outputs_that_do_not_fit():
    c = case()
    few = SparseDistribution(*(torch.zeros(3, 5, 2) for _ in range(3)))
    refused("have 2 a frame: store them as dense", replace(c, teacher_ctc=few), ALL[4])
    other = replace(c, teacher_ctc=torch.zeros(3, 5, 7))
    refused("teacher's CTC head has 7 tokens and the student's joiner 6", other, ALL[4])
    other = replace(c, ctc=torch.zeros(3, 5, 5))
    refused("student's CTC head has 5 tokens", other, ALL[4])
    last = int(c.nodes.frame.max())
    short = replace(c, teacher_ctc=c.teacher_ctc[:, :last])
    refused(
        rf"frame {last}, and the teacher's CTC output .*\(3, {last}, 6", short, ALL[4]
    )
    refused("temperature.? is 0", c, ALL[4], temperature=0)
    with pytest.raises(KDError, match="ctc_share. is 1.5"):
        total_kd_loss(c.student(), c.ctc, c.teacher_ctc, temperature=1.0, ctc_share=1.5)


@pytest.mark.parametrize("form", ALL)
def test_nan_in_the_student_is_refused_by_name(form):
    c = case()
    spoilt = c.encoder_out.detach().clone()
    spoilt[c.nodes.row[0], c.nodes.frame[0], 1] = NAN
    c = replace(c, encoder_out=spoilt)
    # One frame alone, so that every form reads it.
    c = replace(c, nodes=c.nodes.select(torch.tensor([0])))
    refused(r"student's joiner states of shape \(1, 4\) have NaN", c, form)


def test_nan_in_ctc_logits_is_refused_by_name():
    c = case()
    spoilt = replace(c, ctc=torch.full_like(c.ctc, NAN))
    refused("CTC logits at the lattice's frames of shape", spoilt, "total")
