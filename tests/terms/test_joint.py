"""JointKDLoss: the two terms, their weights, and pairs that don't fit."""

import math

import pytest
import torch

from icefall_kd import JointKDLoss, ModelTap, ctc_kd_loss
from icefall_kd.errors import KDError
from icefall_kd.losses.nodes import nodes_of
from icefall_kd.losses.transducer import transducer_kd_loss
from icefall_kd.terms import CtcTerm, TransducerTerm
from icefall_kd.terms.finite import PATIENCE
from icefall_kd.types import EncoderOut, SparseDistribution, Targets


def pair(lens=(5, 3), t_student=5, t_teacher=5, v_student=4, v_teacher=4):
    """What a student gave and a teacher said on a batch of two."""
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, t_student, v_student, generator=g)
    targets = 2 * torch.randn(2, t_teacher, v_teacher, generator=g)
    lens = torch.tensor(lens)
    student = EncoderOut(
        encoder_out=torch.zeros(2, t_student, 6),
        encoder_out_lens=lens,
        ctc_logits=logits.requires_grad_(),
    )
    return student, Targets(lens.clone(), parts={"ctc": targets})


def joint_of(ctc=1.0, hard=1.0, temperature=1.0, rnnt=0.0, **options):
    """The joint loss of a CTC term and a transducer's term with ``options``."""
    return JointKDLoss(
        [CtcTerm(ctc, temperature), TransducerTerm(rnnt, temperature, **options)],
        hard_weight=hard,
    )


def hard(value=37.0):
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize(
    "ctc_weight, hard_weight", [(0.8, 0.2), (0.25, 0.5), (3.0, 1.0), (0.7, 0), (0, 0.3)]
)
def test_the_loss_is_the_weighted_sum(ctc_weight, hard_weight):
    student, targets = pair()
    joint = joint_of(ctc_weight, hard_weight, temperature=3.0)
    hard_loss = hard()
    loss, _ = joint(hard_loss, student, targets)
    kd = ctc_kd_loss(
        student.ctc_logits, targets.parts["ctc"], targets.lens, temperature=3.0
    )
    # The terms differ, so swapped weights and a dropped term both give another sum.
    assert kd > 1 and abs(kd - hard_loss) > 1
    assert torch.equal(loss, hard_weight * hard_loss + ctc_weight * kd)


def test_the_weights_reach_the_gradients():
    student, targets = pair()
    hard_loss = hard()
    loss, _ = joint_of(0.75, 0.5, temperature=2.0)(hard_loss, student, targets)
    loss.backward()
    logits = student.ctc_logits.detach().clone().requires_grad_()
    ctc_kd_loss(logits, targets.parts["ctc"], targets.lens, temperature=2.0).backward()
    assert hard_loss.grad == 0.5
    torch.testing.assert_close(student.ctc_logits.grad, 0.75 * logits.grad)
    assert logits.grad.abs().max() > 0.1


def test_defaults():
    joint = JointKDLoss([CtcTerm()])
    assert joint.weights() == {"hard": 1.0, "ctc": 1.0}
    assert joint.terms["ctc"].temperature == 1.0


def test_info_is_the_unweighted_term():
    student, targets = pair()
    _, info = joint_of(0.1, 0.9, 2.0)(hard(), student, targets)
    kd = ctc_kd_loss(
        student.ctc_logits, targets.parts["ctc"], targets.lens, temperature=2.0
    )
    assert info == {"kd_ctc_loss": kd.item(), "kd_frames": 8.0}
    assert type(info["kd_ctc_loss"]) is float and type(info["kd_frames"]) is float


def test_frames_beyond_the_longest_utterance_may_differ():
    student, targets = pair(t_student=7, t_teacher=6)
    loss, info = joint_of(0.5, 0.5, 2.0)(hard(), student, targets)
    kd = ctc_kd_loss(
        student.ctc_logits[:, :5],
        targets.parts["ctc"][:, :5],
        targets.lens,
        temperature=2.0,
    )
    assert info["kd_ctc_loss"] == kd.item()


def test_no_frames_leave_the_weighted_hard_loss():
    student, targets = pair(lens=(0, 0))
    loss, info = joint_of(0.8, 0.25, 2.0)(hard(8.0), student, targets)
    assert loss == 2.0 and info == {"kd_ctc_loss": 0.0, "kd_frames": 0.0}


# Masks and parts of cuts


def test_frames_outside_the_mask_do_not_count():
    student, targets = pair()
    targets.mask[0, 1:3] = False
    targets.parts["ctc"][0, 1:3] = math.nan
    loss, info = joint_of(0.5, 0.5, 2.0)(hard(), student, targets)
    kept = [0, 3, 4]
    kd = ctc_kd_loss(
        torch.stack([student.ctc_logits[0, kept], student.ctc_logits[1, :3]]),
        torch.stack([targets.parts["ctc"][0, kept], targets.parts["ctc"][1, :3]]),
        torch.tensor([3, 3]),
        temperature=2.0,
    )
    assert info["kd_ctc_loss"] == pytest.approx(kd.item(), rel=1e-6)
    assert info["kd_frames"] == 6.0
    loss.backward()
    assert torch.isfinite(student.ctc_logits.grad).all()
    assert student.ctc_logits.grad[0, 1:3].abs().max() == 0


@pytest.mark.parametrize("lens", [(4, 3), (5, 2), (7, 3), (5, 6)])
def test_a_part_of_a_cut_may_have_other_frames(lens):
    """The student's front end has edges where the whole cut has none."""
    student, targets = pair(lens, t_student=max(lens), t_teacher=5)
    targets = Targets(
        torch.tensor([5, 3]), None, torch.tensor([False, False]), targets.parts
    )
    common = [min(a, b) for a, b in zip(lens, [5, 3], strict=True)]
    loss, info = joint_of(0.5, 0.5, 2.0)(hard(), student, targets)
    t = min(max(lens), 5)
    kd = ctc_kd_loss(
        student.ctc_logits[:, :t],
        targets.parts["ctc"][:, :t],
        torch.tensor(common),
        temperature=2.0,
    )
    assert info["kd_ctc_loss"] == pytest.approx(kd.item(), rel=1e-6)
    assert info["kd_frames"] == sum(common)


def test_one_whole_cut_that_moved_is_refused_among_parts():
    student, targets = pair()
    targets = Targets(
        torch.tensor([4, 4]), None, torch.tensor([False, True]), targets.parts
    )
    with pytest.raises(KDError, match="changed after the targets were made"):
        joint_of()(hard(), student, targets)


def test_a_batch_without_any_targets_has_the_hard_loss_alone():
    student, _ = pair()
    bare = Targets(
        torch.tensor([0, 0]),
        whole=torch.tensor([False, False]),
        parts={"ctc": torch.zeros(2, 0, 4)},
    )
    loss, info = joint_of(0.8, 0.25, 2.0)(hard(8.0), student, bare)
    assert loss == 2.0 and info == {"kd_ctc_loss": 0.0, "kd_frames": 0.0}
    loss.backward()
    assert student.ctc_logits.grad.abs().max() == 0


def test_sparse_targets_of_all_symbols_are_as_dense_ones():
    student, targets = pair()
    dense, _ = joint_of(0.5, 0.5, 2.0)(hard(), student, targets)
    log_probs, indices = (
        (targets.parts["ctc"] / 2).log_softmax(-1).sort(-1, descending=True)
    )
    sparse = SparseDistribution(indices, log_probs, torch.full((2, 5), -math.inf))
    found, info = joint_of(0.5, 0.5, 2.0)(
        hard(), student, Targets(targets.lens, parts={"ctc": sparse})
    )
    torch.testing.assert_close(found, dense)
    assert info["kd_frames"] == 8.0


# Refusals


@pytest.mark.parametrize("name", ["ctc", "hard", "rnnt"])
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "x", None])
def test_a_weight_out_of_range_is_refused(name, value):
    names = {"ctc": "CtcTerm.weight", "rnnt": "TransducerTerm.weight"}
    with pytest.raises(KDError, match=f"`{names.get(name, 'hard_weight')}` is ") as e:
        joint_of(**{name: value})
    assert repr(value) in str(e.value)


def test_no_weight_above_0_are_refused():
    with pytest.raises(KDError, match="all 0"):
        joint_of(0, 0)


@pytest.mark.parametrize("temperature", [0, -2.0, math.inf, math.nan])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(KDError, match="temperature") as e:
        joint_of(temperature=temperature)
    assert repr(temperature) in str(e.value)


def test_other_frames_are_refused():
    student, targets = pair()
    targets.lens = torch.tensor([5, 4])
    with pytest.raises(KDError) as e:
        joint_of()(hard(), student, targets)
    assert "[5, 3]" in str(e.value) and "[5, 4]" in str(e.value)
    assert "icefall-kd dump" in str(e.value)


def test_other_tokens_are_refused():
    student, targets = pair(v_teacher=9)
    with pytest.raises(KDError, match="tokenizer") as e:
        joint_of()(hard(), student, targets)
    assert "4 tokens" in str(e.value) and "have 9" in str(e.value)


# The transducer's term


@pytest.fixture
def transducer(make_model, features):
    """A student's forward pass with its graph, and a teacher's nodes on the batch."""
    y = [[3, 4, 3], [5, 6], [7]]
    with ModelTap(make_model(seed=1)) as hook:
        said = hook.encode(*features)
        nodes = nodes_of(hook.lattice(said, y, 3))
    model = make_model(seed=2).eval()
    hook = ModelTap(model, with_decoder=True)
    x, x_lens = features
    model(x=x, x_lens=x_lens, y=y, prune_range=3)
    student = hook.take()
    parts = {"ctc": said.ctc_logits, "nodes": nodes}
    targets = Targets(said.encoder_out_lens, parts=parts)
    return model, student, targets


def test_the_transducers_term_is_weighed_and_named(transducer):
    model, student, targets = transducer
    assert student.labels.shape == (3, 4) and student.labels[:, 0].eq(0).all()
    joint = joint_of(0.75, 0.5, 2.0, rnnt=0.3, form="collapsed")
    loss, info = joint(hard(), student, targets, model)
    kd_rnnt = transducer_kd_loss(
        model.joiner,
        student.encoder_out,
        student.decoder_out,
        targets.parts["nodes"],
        student.encoder_out_lens,
        temperature=2.0,
        form="collapsed",
    )
    kd_ctc = ctc_kd_loss(
        student.ctc_logits, targets.parts["ctc"], targets.lens, temperature=2.0
    )
    torch.testing.assert_close(loss, 0.5 * 37.0 + 0.75 * kd_ctc + 0.3 * kd_rnnt)
    assert kd_rnnt > 0.1 and info["kd_rnnt_loss"] == pytest.approx(float(kd_rnnt))
    loss.backward()
    for name in ("encoder_embed", "decoder", "joiner", "ctc_output"):
        grads = [p.grad for p in getattr(model, name).parameters()]
        assert any(g is not None and g.abs().max() > 0 for g in grads), name
    assert "rnnt" in str(joint) and "collapsed" in str(joint)


def test_the_transducers_term_alone_needs_no_ctc_targets(transducer):
    model, student, targets = transducer
    targets.parts["ctc"] = student.ctc_logits = None
    joint = joint_of(0, 1.0, rnnt=1.0, shift=1)
    _, info = joint(hard(), student, targets, model)
    assert set(info) == {"kd_rnnt_loss", "kd_rnnt_frames"}
    assert info["kd_rnnt_loss"] > 0
    assert info["kd_rnnt_frames"] == student.encoder_out_lens.sum()


def test_a_batch_without_lattices_has_a_zero_term_for_every_parameter(transducer):
    model, student, targets = transducer
    targets.parts["nodes"], targets.parts["lattice"] = None, [None, None, None]
    loss, info = joint_of(0, 1.0, rnnt=1.0)(hard(), student, targets, model)
    assert info["kd_rnnt_loss"] == 0
    loss.backward()
    assert all(
        p.grad is not None and p.grad.eq(0).all() for p in model.joiner.parameters()
    )


def test_lattices_of_other_transcripts_are_refused(transducer):
    model, student, targets = transducer
    student.labels = student.labels.clone()
    student.labels[1, 2] = 9
    with pytest.raises(KDError, match="label 2 of row 1 .* is 9 for the student and 6"):
        joint_of(rnnt=1.0)(hard(), student, targets, model)


def not_finite():
    student, targets = pair()
    student.ctc_logits = student.ctc_logits.detach().clone()
    student.ctc_logits[1, 2, 3] = math.nan
    return student, targets


def test_a_batch_that_is_not_finite_is_left_to_the_recipe_and_counted(caplog):
    joint = joint_of(hard=1.0)
    recipe_loss = hard()
    for count in (1, 2):
        caplog.clear()
        loss, info = joint(recipe_loss, *not_finite())
        assert loss == recipe_loss and info["kd_ctc_loss"] == info["kd_frames"] == 0
        (warning,) = caplog.messages
        assert f"({count} so far were not finite): kd_ctc_loss is nan" in warning
        caplog.clear()
        loss, info = joint(recipe_loss, *pair())
        assert info["kd_ctc_loss"] > 0 and not caplog.messages


def test_distillation_that_stays_not_finite_is_ended():
    joint = joint_of()
    for _ in range(PATIENCE - 1):
        joint(hard(), *not_finite())
    joint(hard(), *pair())  # and the count begins anew
    for _ in range(PATIENCE - 1):
        joint(hard(), *not_finite())
    with pytest.raises(
        KDError, match=f"{PATIENCE} batches in a row: kd_ctc_loss is nan"
    ):
        joint(hard(), *not_finite())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_recipe_loss_without_weight_is_no_term(bad):
    student, targets = pair()
    student.ctc_logits.retain_grad()
    recipe_loss = student.ctc_logits.sum() * bad
    loss, info = joint_of(hard=0.0)(recipe_loss, student, targets)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert torch.isfinite(student.ctc_logits.grad).all()


def test_a_recipe_loss_without_weight_has_a_zero_gradient_for_each_parameter():
    """DDP waits for them; Zipformer's BiasNorm has one without a dimension."""
    model = torch.nn.Linear(2, 3)
    model.log_scale = torch.nn.Parameter(torch.tensor(1.0))
    recipe_loss = math.inf * sum(p.sum() for p in model.parameters())
    loss, _ = joint_of(hard=0.0)(recipe_loss, *pair(), model)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_recipe_loss_with_weight_stays_as_it_is():
    """So that the recipe's GradScaler skips the step, as it does without KD."""
    loss, _ = joint_of(hard=0.5)(hard() * math.inf, *pair())
    assert loss == math.inf


@pytest.mark.parametrize(
    "options, match",
    [
        ({"form": "full"}, "`TransducerTerm.form`"),
        ({"shift": -1}, "`TransducerTerm.shift`"),
        ({"shift": 1.5}, "`TransducerTerm.shift`"),
    ],
)
def test_bad_options_of_the_transducers_term_are_refused(options, match):
    with pytest.raises(KDError, match=match):
        joint_of(rnnt=1.0, **options)


# CR-CTC's batch, which stands there twice


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_of_a_batch_have_the_mean_of_their_terms(sparse):
    """[x1..xN, x1..xN], as the recipe's own losses halve it."""
    student, targets = pair()
    if sparse:
        log_probs, indices = (
            targets.parts["ctc"].log_softmax(-1).sort(-1, descending=True)
        )
        rest = torch.full(log_probs.shape[:2], -math.inf)
        targets.parts["ctc"] = SparseDistribution(indices, log_probs, rest)
    other = (0.5 * student.ctc_logits.detach()).requires_grad_()
    both = torch.cat([student.ctc_logits, other])
    doubled = EncoderOut(
        encoder_out=student.encoder_out.repeat(2, 1, 1),
        encoder_out_lens=student.encoder_out_lens.repeat(2),
        ctc_logits=both,
    )
    joint, kd = joint_of(0.75, 0.5, 2.0), []
    for logits in (student.ctc_logits, other):
        kd.append(
            ctc_kd_loss(logits, targets.parts["ctc"], targets.lens, temperature=2.0)
        )
    loss, info = joint(hard(8.0), doubled, targets)
    torch.testing.assert_close(loss, 4.0 + 0.75 * (kd[0] + kd[1]) / 2)
    assert info["kd_frames"] == 8.0
    assert info["kd_ctc_loss"] == pytest.approx(float(kd[0] + kd[1]) / 2)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_targets_of_another_batch_are_refused(rows):
    student, _ = pair()
    lens = torch.full((rows,), 5)
    targets = Targets(lens, parts={"ctc": torch.zeros(rows, 5, 4)})
    if rows == 1:
        parts = {"ctc": torch.zeros(3, 5, 4)}
        targets = Targets(torch.full((3,), 5), parts=parts)
    with pytest.raises(
        KDError, match=f"2 rows and the teacher's targets {len(targets.lens)}"
    ):
        joint_of()(hard(), student, targets)


def test_copies_of_a_lattice_have_the_mean_of_their_terms(transducer):
    model, student, targets = transducer
    joint = joint_of(0.0, 1.0, rnnt=1.0)
    once, info = joint(hard(), student, targets, model)
    twice = EncoderOut(
        **{
            k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v
            for k, v in vars(student).items()
        }
    )
    again, doubled = joint(hard(), twice, targets, model)
    torch.testing.assert_close(again, once)
    assert doubled == pytest.approx(info) and info["kd_rnnt_loss"] > 1e-3
