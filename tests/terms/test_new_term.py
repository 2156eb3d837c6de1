"""A term that nothing in the package knows: one class, registered in one place."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from icefall_kd import CtcTerm, JointKDLoss, ctc_kd_loss
from icefall_kd.errors import KDError
from icefall_kd.report.comparison import Comparison, Model, Run, TestAudio
from icefall_kd.report.logs import read_training
from icefall_kd.terms import TERMS, register_term
from icefall_kd.terms.base import Option, Term
from icefall_kd.terms.schedule import Curve
from icefall_kd.training.options import add_options, distils, flags_in_errors
from icefall_kd.types import EncoderOut, Targets


class SquareTerm(Term):
    """The squared distance of the CTC outputs, times a scale."""

    name = "square"
    kinds = ("ctc",)
    heads = ("ctc",)
    options = (
        Option("square-weight", "weight", Curve, 0.0, "Weight of the square term."),
        Option("square-scale", "scale", float, 2.0, "Factor of the square term."),
    )

    def __init__(self, weight=1.0, scale=2.0):
        super().__init__(weight)
        if scale <= 0:
            raise KDError(f"{self.parameter('scale')} is {scale}: give more than 0")
        self.scale = scale

    def note(self):
        return f"scale {self.scale:g}"

    def value(self, batch):
        student, teacher = batch.ctc_logits()
        distance = (student - teacher)[batch.mask].square().sum()
        return self.scale * distance, float(batch.mask.sum())


@pytest.fixture(autouse=True)
def registered():
    register_term(SquareTerm)
    yield
    del TERMS["square"]


def parse(*words):
    parser = argparse.ArgumentParser()
    add_options(parser, words)
    return vars(parser.parse_args(words))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    lens = torch.tensor([5, 3])
    student = EncoderOut(
        torch.zeros(2, 5, 6),
        lens,
        ctc_logits=torch.randn(2, 5, 4, generator=g).requires_grad_(),
    )
    targets = Targets(lens, parts={"ctc": torch.randn(2, 5, 4, generator=g)})
    return student, targets


def test_its_options_are_on_the_command_line_and_in_the_file(tmp_path):
    assert not distils(parse())
    params = parse("--kd-square-weight", "0:1,3:0.5", "--kd-square-scale", "3")
    assert (params["kd_square_weight"], params["kd_square_scale"]) == ("0:1,3:0.5", 3.0)
    assert distils(params)
    (tmp_path / "kd.yaml").write_text("square-weight: 0.25\nsquare_scale: 4\n")
    params = parse("--kd-config", str(tmp_path / "kd.yaml"))
    assert (params["kd_square_weight"], params["kd_square_scale"]) == (0.25, 4.0)


def test_its_errors_name_its_options():
    with pytest.raises(KDError, match="^`SquareTerm.scale` is -1"):
        SquareTerm(scale=-1)
    with pytest.raises(KDError, match="^--kd-square-scale is -1.0"):
        with flags_in_errors():
            JointKDLoss.from_params(parse("--kd-square-scale", "-1"))


def test_its_value_is_added_and_logged_beside_another_term(batch):
    student, targets = batch
    words = ("--kd-square-weight", "0.5", "--kd-ctc-weight", "2", "--kd-hard-weight=3")
    joint = JointKDLoss.from_params(parse(*words))
    assert str(joint) == (
        "3.0 * loss + 2.0 * kd_ctc_loss + 0.5 * kd_square_loss (scale 2), "
        "temperature 1.0"
    )
    loss, info = joint(torch.tensor(7.0), student, targets)
    mask, logits, teacher = targets.mask, student.ctc_logits, targets.parts["ctc"]
    square = 2 * (logits - teacher)[mask].square().sum()
    ctc = ctc_kd_loss(logits, teacher, targets.lens)
    torch.testing.assert_close(loss, 21 + 2 * ctc + 0.5 * square)
    assert square > 1 and info["kd_square_loss"] == pytest.approx(square.item())
    assert info["kd_square_frames"] == 8.0
    (gradient,) = torch.autograd.grad(square, logits, retain_graph=True)
    loss.backward()
    assert gradient.abs().max() > 0 and not torch.equal(logits.grad, 0.5 * gradient)


def test_its_needs_are_checked(make_fingerprint, make_model):
    joint = JointKDLoss([SquareTerm()])
    assert joint.kinds == joint.teacher_kinds == ["ctc"]
    assert joint.heads(make_model()) == ["ctc"]
    joint.check_store(make_fingerprint(ctc="dense"), "kd")
    with pytest.raises(KDError, match="kd keeps no CTC targets, .* kd_square_loss"):
        joint.check_store(make_fingerprint(ctc="", lattice="dense"), "kd")
    headless = SimpleNamespace(ctc_output=None, joiner=None)
    with pytest.raises(KDError, match="`SquareTerm.weight` .* has no CTC head"):
        joint.leave_out_terms(headless)


def test_it_is_left_out_where_a_student_lacks_its_head(make_model, caplog):
    class FreeTerm(SquareTerm):
        name, heads = "free", ()

    joint = JointKDLoss([SquareTerm(), CtcTerm(), FreeTerm()])
    joint.leave_out_terms(SimpleNamespace(ctc_output=None, joiner=None))
    assert list(joint.terms) == ["free"]
    assert "kd_square_loss is off: the student has no CTC head" in caplog.text


def test_the_report_has_its_column(tmp_path):
    pytest.importorskip("matplotlib")
    from icefall_kd.report.page import Table
    from icefall_kd.report.tables import blocks_of
    from icefall_kd.report.words import words_of

    (tmp_path / "log").mkdir()
    begin = "2026-01-02 03:04:05,678 INFO [train.py:1] "
    (tmp_path / "log" / "log-train-2026-01-02-03-04-05").write_text(
        begin
        + '{"kd_square_weight": 0.5, "kd_hard_weight": 1.0}\n'
        + begin
        + "Epoch 1,"
        " batch 0, loss[loss=1], tot_loss[loss=1, kd_square_loss=3, over 9 frames. ]\n"
    )
    training = read_training(tmp_path)
    assert training.weights()["square"] == [(0.0, 0.5)]
    model = Model("K", [Run("K", tmp_path, training, [], [])])
    page = Comparison([model], "", "", "WER", TestAudio(), {}, words_of("en"))
    tables = [block for block in blocks_of(page) if isinstance(block, Table)]
    (weights,) = (table for table in tables if table.head[0] == "term")
    assert weights.rows == [["hard", "1"], ["square", "0.5"]]
