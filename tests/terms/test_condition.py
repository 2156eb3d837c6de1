"""Conditional teaching: which utterances teach, and what the others are given."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from calm_model import calm

from icefall_kd import JointKDLoss, ModelTap
from icefall_kd.errors import KDError
from icefall_kd.targets.dataset import map_tokens
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.terms import CtcTerm, FullSumTerm, HiddenTerm, NbestTerm, TransducerTerm
from icefall_kd.types import EncoderOut, Nodes, SparseDistribution, Targets, index_rows

V = 11
Y = [[3, 4, 3], [5, 6], [7]]
TERMS = {
    "ctc": lambda weight=0.7: CtcTerm(weight, temperature=2.0),
    "ctc entropy": lambda weight=0.7: CtcTerm(weight, frame_weighting="entropy"),
    "ctc delay": lambda weight=0.7: CtcTerm(weight, delay=2),
    "rnnt": lambda weight=0.7: TransducerTerm(weight, temperature=2.0),
    "rnnt mean_u": lambda weight=0.7: TransducerTerm(weight, form="mean_u"),
    "rnnt total": lambda weight=0.7: TransducerTerm(weight, form="total"),
    "rnnt shift": lambda weight=0.7: TransducerTerm(weight, shift=1),
    "full_sum": lambda weight=0.7: FullSumTerm(weight),
    "hidden": lambda weight=0.7: HiddenTerm(weight, "out,0:1"),
    "hidden cosine": lambda weight=0.7: HiddenTerm(weight, "0:1", "cosine"),
}


def says(labels, frames):
    """Logits, (frames, V), whose best path is ``labels`` with blanks between."""
    path = [0] * frames
    path[1 : 1 + 2 * len(labels) : 2] = labels
    g = torch.Generator().manual_seed(sum(labels))
    return 6.0 * F.one_hot(torch.tensor(path), V) + torch.rand(frames, V, generator=g)


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.fixture(scope="module")
def given(make_model):
    """A student's forward pass, and a teacher that knows rows 0 and 2."""
    g = torch.Generator().manual_seed(1)
    x, lens = torch.randn(3, 61, 20, generator=g), torch.tensor([61, 42, 23])
    wide = make_model(seed=1, encoder_dim="20,32", encoder_unmasked_dim="12,16")
    targets = Teacher([wide], layers=["out", 0]).targets(x, lens, y=Y, s_range=3)
    frames = targets.lens.tolist()
    known = [says(y, n) for y, n in zip((Y[0], [5], Y[2]), frames)]
    targets.parts["ctc"] = padded(known).log_softmax(-1)
    model = calm(make_model(seed=2), training=False)
    with ModelTap(model, layers=[1], with_decoder=True) as hook, torch.no_grad():
        model(x=x, x_lens=lens, y=Y, prune_range=3)
        student = hook.take()
    return SimpleNamespace(model=model, student=student, targets=targets)


def leaves(student):
    def leaf(x):
        return x.detach().clone().requires_grad_()

    return replace(
        student,
        encoder_out=leaf(student.encoder_out),
        ctc_logits=leaf(student.ctc_logits),
        decoder_out=leaf(student.decoder_out),
        hidden={i: leaf(h) for i, h in student.hidden.items()},
    )


def sub_batch(student, targets, rows):
    """What a batch of some of the rows would be."""
    index = torch.tensor(rows)
    names = ("encoder_out", "encoder_out_lens", "ctc_logits", "decoder_out", "labels")
    values = {name: getattr(student, name)[index] for name in names}
    hidden = {i: h[index] for i, h in student.hidden.items()}
    student = EncoderOut(
        **values, hidden=hidden, hidden_lens=student.hidden_lens[index]
    )
    parts = {name: targets.parts[name][index] for name in ("ctc",)}
    parts["hidden"] = {k: h[index] for k, h in targets.parts["hidden"].items()}
    nodes = targets.parts["nodes"]
    kept = [i for i, row in enumerate(nodes.row.tolist()) if row in rows]
    nodes = index_rows(nodes, torch.tensor(kept))
    nodes.row = torch.tensor([rows.index(row) for row in nodes.row.tolist()])
    parts["nodes"] = nodes
    return student, Targets(targets.lens[index], targets.mask[index], parts=parts)


def run(joint, given, student=None, targets=None, **options):
    student = leaves(given.student) if student is None else student
    hard = torch.tensor(37.0, requires_grad=True)
    loss, info = joint(hard, student, targets or given.targets, given.model, **options)
    inputs = [student.encoder_out, student.ctc_logits, student.decoder_out]
    inputs += list(student.hidden.values())
    grads = torch.autograd.grad(loss, [hard, *inputs], allow_unused=True)
    hard_grad, *grads = grads
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
    return loss, info, float(hard_grad), grads


@pytest.mark.parametrize("condition", ["right", "better"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_that_of_a_batch_of_the_rows_that_teach(given, name, condition):
    """In value and in gradient; the recipe's loss keeps its weight."""
    targets = given.targets
    if condition == "better":  # sure of another transcript
        ctc = targets.parts["ctc"].clone()
        ctc[1, : targets.lens[1]] = 5 * says([9], int(targets.lens[1]))
        targets = replace(targets, parts={**targets.parts, "ctc": ctc.log_softmax(-1)})
    joint = JointKDLoss([TERMS[name]()], hard_weight=0.3, condition=condition)
    found = run(joint, given, targets=targets)
    student = leaves(given.student)
    small, small_targets = sub_batch(student, targets, [0, 2])
    plain = JointKDLoss([TERMS[name]()], hard_weight=0.3)
    hard = torch.tensor(37.0, requires_grad=True)
    loss, info = plain(hard, small, small_targets, given.model)
    assert found[1].pop("kd_taught") == pytest.approx(2 / 3)
    assert set(found[1]) == set(info) and found[2] == pytest.approx(0.3)
    for key, value in info.items():
        assert found[1][key] == pytest.approx(value, rel=1e-4) and value > 0
    torch.testing.assert_close(found[0], loss, rtol=1e-4, atol=1e-3)
    inputs = [student.encoder_out, student.ctc_logits, student.decoder_out]
    inputs += list(student.hidden.values())
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-4 for g in grads)
    for a, b in zip(found[3], grads):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert not a[1].any()
    everything = run(plain, given, targets=targets)[1]
    assert all(everything[key] > 1.0001 * value for key, value in info.items())


def test_a_teacher_that_equals_its_student_is_not_better(given):
    t = given.targets.mask.size(1)
    targets = Targets(
        given.targets.lens, parts={"ctc": given.student.ctc_logits[:, :t]}
    )
    joint = JointKDLoss([CtcTerm()], condition="better")
    assert run(joint, given, targets=targets)[1]["kd_taught"] == 0.0


@pytest.mark.parametrize("condition", ["right", "better"])
def test_where_none_teaches_all_terms_are_0_with_a_zero_gradient(given, condition):
    ctc = padded([says([9], n) for n in given.targets.lens.tolist()])
    if condition == "better":
        ctc = torch.full_like(ctc, -50.0)
        ctc[..., 9] = 50.0
    parts = {**given.targets.parts, "ctc": ctc.log_softmax(-1)}
    terms = [TERMS[name]() for name in ("ctc", "rnnt", "full_sum", "hidden")]
    joint = JointKDLoss(terms, hard_weight=0.3, condition=condition)
    targets = replace(given.targets, parts=parts)
    loss, info, hard_grad, grads = run(joint, given, targets=targets)
    assert float(loss) == pytest.approx(0.3 * 37.0) and hard_grad == pytest.approx(0.3)
    assert set(info.values()) == {0.0} and "kd_taught" in info
    assert all(g.isfinite().all() and not g.any() for g in grads)


NONE = torch.zeros(3, dtype=torch.bool)  # of the rows has a transcript


def test_a_batch_without_transcripts_teaches_throughout(given):
    terms = [TERMS["ctc"](), TERMS["rnnt"]()]
    plain = run(JointKDLoss(terms), given, transcribed=NONE)
    found = run(JointKDLoss(terms, condition="right"), given, transcribed=NONE)
    assert torch.equal(found[0], plain[0]) and found[1].pop("kd_taught") == 1.0
    assert found[1] == plain[1]


def test_rows_without_targets_do_not_count_as_teaching(given):
    mask = given.targets.mask.clone()
    mask[0] = False
    targets = replace(given.targets, mask=mask)
    joint = JointKDLoss([TERMS["ctc"]()], condition="right")
    first = torch.tensor([True, False, False])
    for transcribed, share in ((None, 1 / 3), (NONE, 2 / 3), (first, 2 / 3)):
        info = run(joint, given, targets=targets, transcribed=transcribed)[1]
        assert info["kd_taught"] == pytest.approx(share)


def test_all_batches_log_the_same_keys_and_none_where_it_is_off(given):
    terms = [CtcTerm("0:0,10:1"), HiddenTerm(0.1, "out")]
    joint = JointKDLoss(terms, condition="right")
    infos = [run(joint, given, epoch=e)[1] for e in (0.0, 5.0)]
    untaught = replace(given.targets, mask=torch.zeros_like(given.targets.mask))
    infos.append(run(joint, given, targets=untaught)[1])
    assert [list(info) for info in infos] == 3 * [list(infos[0])]
    assert "kd_taught" not in run(JointKDLoss(terms), given)[1]


def test_a_batch_without_any_term_has_no_utterance_that_teaches(given):
    joint = JointKDLoss([CtcTerm("0:0,10:1")], condition="right")
    assert run(joint, given, epoch=0.0)[1]["kd_taught"] == 0.0
    assert run(joint, given, epoch=5.0)[1]["kd_taught"] > 0


def test_a_schedule_leaves_the_recipes_loss_its_weight_in_every_row(given):
    """(1 - a) + a h of the whole batch, whoever teaches."""
    from icefall_kd.terms.schedule import Schedule

    ends = {"hard_weight": 0.2, "schedule": Schedule("finetune", 100)}
    joint = JointKDLoss([TERMS["ctc"]()], **ends, condition="right")
    plain = JointKDLoss([TERMS["ctc"]()], **ends)
    weights = joint.weights(2.0)
    assert weights == plain.weights(2.0) and 0.2 < weights["hard"] < 1
    loss, info, hard_grad, _ = run(joint, given, epoch=2.0)
    assert hard_grad == pytest.approx(weights["hard"])
    expected = weights["hard"] * 37.0 + weights["ctc"] * info["kd_ctc_loss"]
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_each_copy_of_cr_ctc_is_compared_by_itself(given):
    """One copy is as good as its teacher in row 0, and the other isn't."""
    double = {
        name: torch.cat([getattr(given.student, name)] * 2)
        for name in ("encoder_out", "encoder_out_lens", "ctc_logits", "labels")
    }
    frames = int(given.targets.lens[0])
    double["ctc_logits"] = double["ctc_logits"].clone()
    double["ctc_logits"][3, :frames] = 2 * given.targets.parts["ctc"][0, :frames]
    student = EncoderOut(**double)
    joint = JointKDLoss([CtcTerm()], condition="better")
    hard = torch.tensor(1.0, requires_grad=True)
    _, info = joint(hard, student, given.targets, given.model)
    lens = given.targets.lens.tolist()
    assert info["kd_taught"] == pytest.approx(5 / 6)
    assert info["kd_frames"] == (2 * sum(lens) - lens[0]) / 2


def test_better_is_by_the_ctc_loss_of_the_transcript(given):
    joint = JointKDLoss([CtcTerm()], condition="better")
    lens, labels = given.targets.lens, given.student.labels
    generator = torch.Generator().manual_seed(3)
    taught = set()
    for _ in range(8):
        noise = 3 * torch.randn(3, int(lens.max()), V, generator=generator)
        parts = {"ctc": noise.log_softmax(-1)}
        targets = Targets(lens, parts=parts)
        info = run(joint, given, targets=targets)[1]
        losses = [
            F.ctc_loss(
                logits[:, : lens.max()].log_softmax(-1).transpose(0, 1),
                labels[:, 1:],
                lens,
                torch.tensor([len(y) for y in Y]),
                reduction="none",
            )
            for logits in (noise, given.student.ctc_logits)
        ]
        share = float((losses[0] < losses[1]).float().mean())
        assert info["kd_taught"] == pytest.approx(share)
        taught.add(share)
    assert len(taught) > 1


@pytest.mark.parametrize("condition", ["right", "better"])
def test_a_transcript_of_more_labels_than_frames_is_not_taught(given, condition):
    frames = int(given.targets.lens[2])
    labels = torch.zeros(3, frames + 3, dtype=torch.int64)
    labels[:, : given.student.labels.size(1)] = given.student.labels
    labels[2, 1 : frames + 2] = 7
    student = replace(leaves(given.student), labels=labels)
    joint = JointKDLoss([CtcTerm()], condition=condition)
    loss, info, _, grads = run(joint, given, student)
    assert loss.isfinite() and not grads[1][2].any() and grads[1][0].any()


def test_a_part_of_a_cut_is_judged_by_the_frames_that_both_have(given):
    """The student has fewer frames than the targets, some of which are noise's."""
    lens = given.targets.lens
    ctc = padded([says([3], n) for n in lens.tolist()]).log_softmax(-1)
    mask = given.targets.mask.clone()
    mask[0, 4:7] = False
    ctc[0, 4:7] = math.nan
    ctc[1, lens[1] - 1 :, 8] = 50.0  # what only the teacher has
    whole = torch.zeros(3, dtype=torch.bool)
    student = replace(
        leaves(given.student),
        encoder_out_lens=lens - 1,
        labels=torch.tensor([[0, 3], [0, 3], [0, 4]]),
    )
    for condition in ("right", "better"):
        joint = JointKDLoss([CtcTerm()], condition=condition)
        targets = Targets(lens, mask, whole, {"ctc": ctc})
        loss, info, _, _ = run(joint, given, student, targets)
        assert loss.isfinite()
        if condition == "right":
            assert info["kd_taught"] == pytest.approx(2 / 3)


def test_sparse_targets_have_a_best_token_and_a_score(given):
    log_probs, indices = given.targets.parts["ctc"].topk(3)
    tail = (1 - log_probs.exp().sum(-1)).clamp(min=0).log()
    parts = {"ctc": SparseDistribution(indices, log_probs, tail)}
    for condition in ("right", "better"):
        joint = JointKDLoss([CtcTerm()], condition=condition)
        dense = run(
            joint,
            given,
            targets=replace(given.targets, parts={"ctc": given.targets.parts["ctc"]}),
        )[1]
        sparse = run(joint, given, targets=replace(given.targets, parts=parts))[1]
        assert sparse["kd_taught"] == dense["kd_taught"] > 0


def test_a_student_without_a_ctc_head_can_ask_for_right_alone(given, make_model):
    student = replace(leaves(given.student), ctc_logits=None)
    joint = JointKDLoss([TERMS["rnnt"]()], condition="right")
    hard = torch.tensor(1.0, requires_grad=True)
    _, info = joint(hard, student, given.targets, given.model)
    assert info["kd_taught"] == pytest.approx(2 / 3)
    headless = make_model(use_ctc=False)
    joint.leave_out_terms(headless)
    assert joint.kinds == ["lattice", "ctc"] and joint.heads(headless) == ["transducer"]
    better = JointKDLoss([TERMS["rnnt"]()], condition="better")
    with pytest.raises(KDError, match="`condition` is better .* no CTC head.* right"):
        better.leave_out_terms(headless)


def test_tokens_of_another_order_are_those_of_the_student(given):
    order = torch.tensor([0, *range(V - 1, 0, -1)])  # student's id of the teacher's
    theirs = given.targets.parts["ctc"][..., order]
    targets = Targets(given.targets.lens, parts={"ctc": theirs})
    joint = JointKDLoss([CtcTerm()], condition="right")
    assert run(joint, given, targets=targets)[1]["kd_taught"] == 0.0
    found = run(joint, given, targets=map_tokens(targets, order))[1]
    assert found["kd_taught"] == pytest.approx(2 / 3)


def test_targets_of_some_rows_lose_nothing_else(given):
    rows = torch.tensor([True, False, True])
    nodes = given.targets.parts["nodes"]
    parts = {"nodes": nodes, "lattice": list("abc"), "nbest": list("xyz")}
    targets = Targets(given.targets.lens, parts=parts)
    found = targets.of_rows(rows)
    assert isinstance(found.parts["nodes"], Nodes)
    assert set(found.parts["nodes"].row.tolist()) == {0, 2}
    assert len(found.parts["nodes"]) == int((nodes.row != 1).sum()) < len(nodes)
    assert found.parts["lattice"] == ["a", None, "c"]
    assert found.parts["nbest"] == list("xyz")
    assert found.mask.any(1).tolist() == [True, False, True]
    assert targets.mask.any(1).all() and len(targets.parts["nodes"]) == len(nodes)
    assert targets.of_rows(rows & False).parts["nodes"] is None


def test_n_best_lists_teach_in_every_row(given):
    lists = [[([3, 4], -0.5)], [([5], -1.0)], []]
    parts = {**given.targets.parts, "nbest": lists}
    targets = replace(given.targets, parts=parts)
    terms = [TERMS["ctc"](), NbestTerm(1.0)]
    plain = run(JointKDLoss(terms), given, targets=targets)[1]
    found = run(JointKDLoss(terms, condition="right"), given, targets=targets)[1]
    assert found["kd_nbest_loss"] == plain["kd_nbest_loss"] > 0
    assert found["kd_ctc_loss"] < plain["kd_ctc_loss"]


# What is refused


@pytest.mark.parametrize("word", ["", "wrong", "Right", 1])
def test_another_word_is_refused(word):
    with pytest.raises(KDError, match="`condition` is .*one of none, right, better"):
        JointKDLoss([CtcTerm()], condition=word)


def test_a_condition_of_no_outputs_of_a_teacher_is_refused(given):
    joint = JointKDLoss([NbestTerm(1.0)], condition="right")
    with pytest.raises(KDError, match="no term reads a teacher's outputs: .* none"):
        joint.leave_out_terms(given.model)


@pytest.mark.parametrize(
    "condition, ctc, words",
    [
        ("right", "", "keeps no CTC targets.* --keep dense"),
        ("better", "", "keeps no CTC targets.* --keep dense"),
        ("right", "sampled:12", "kept as sampled:12, random draws"),
        ("better", "sampled:12", "kept as sampled:12, random draws"),
        ("better", "top:4@2", "kept as top:4@2, softmaxes at temperature 2"),
    ],
)
def test_a_store_that_does_not_tell_is_refused(make_fingerprint, condition, ctc, words):
    fingerprint = make_fingerprint(ctc=ctc, lattice="dense")
    joint = JointKDLoss([TransducerTerm()], condition=condition)
    with pytest.raises(KDError, match=f"`condition` is {condition} .*{words}") as e:
        joint.check_store(fingerprint, "data/kd")
    assert "\n" not in str(e.value)
    JointKDLoss([TransducerTerm()]).check_store(fingerprint, "data/kd")


@pytest.mark.parametrize("ctc", ["dense", "top:4@2", "adaptive:.9:4@2"])
def test_the_best_token_is_the_same_at_every_temperature(make_fingerprint, ctc):
    fingerprint = make_fingerprint(ctc=ctc, lattice="dense")
    JointKDLoss([TransducerTerm()], condition="right").check_store(fingerprint, "kd")


def test_the_log_names_the_condition():
    text = str(JointKDLoss([CtcTerm()], condition="right"))
    assert text.endswith(", of utterances where the teacher is right")
    assert "teacher" not in str(JointKDLoss([CtcTerm()]))
