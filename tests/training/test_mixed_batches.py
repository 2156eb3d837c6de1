"""Batches whose cuts have transcripts of people, of a teacher, or none."""

import pytest
import torch
from calm_model import calm
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset
from lhotse.utils import fastcopy
from zipformer.utils import MetricsTracker

from icefall_kd.errors import KDError
from icefall_kd.rnnt import get_engine
from icefall_kd.training import session
from icefall_kd.training.hard_rows import TRANSDUCER, HardRows

# Of one length, so that no padding comes in between.
TEXTS = {"c1": "zero one", "c2": "two", "c3": "six z"}
LENGTHS = {"c1": 61, "c2": 61, "c3": 61}
ALL = slice(None)
ROWS = torch.tensor([True, False, True])


@pytest.fixture
def student(make_model):
    return calm(make_model(vocab_size=25, seed=3))


@pytest.fixture
def recipe(sp):
    """A recipe's compute_loss up to its loss; ``rows`` chooses rows of the batch."""

    def run(model, batch, rows=ALL):
        texts = batch["supervisions"]["text"][rows]
        losses = model(
            x=batch["inputs"][rows],
            x_lens=batch["supervisions"]["num_frames"][rows],
            y=sp.encode(texts, out_type=int),
            prune_range=3,
        )
        return sum(w * x.sum() for w, x in zip((0.5, 1.0, 0.2), losses))

    return run


def changed(cuts, texts, labelled=()):
    """The cuts with other texts, and some with a teacher's."""

    def change(segment):
        custom = {"kd_label": {"teacher": "x"}} if segment.id in labelled else None
        return fastcopy(segment, text=texts[segment.id], custom=custom)

    return CutSet.from_cuts(cut.map_supervisions(change) for cut in cuts)


@pytest.fixture
def mixed(cuts):
    names = {cut.supervisions[0].id: cut.id for cut in cuts}
    texts = {s: TEXTS[c] if c != "c2" else None for s, c in names.items()}
    labelled = [s for s, c in names.items() if c == "c3"]
    return changed(cuts, texts, labelled)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {n: grad.clone() for n, grad in grads.items() if grad is not None}


@pytest.fixture
def batch_of(student, online, bpe_models):
    def make(cuts, hard=1.0, **changes):
        bpe = str(bpe_models.a)
        session.attach(online(ctc=0.5, hard=hard, bpe_model=bpe, **changes), student)
        return session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]

    return make


def joint(model, batch, recipe):
    info = MetricsTracker()
    session.begin(batch)
    loss = recipe(model, batch)
    return session.joint_loss(loss, info, model, batch), dict(info), float(loss)


def test_the_recipes_losses_are_those_of_the_transcribed_rows(
    student, batch_of, mixed, recipe
):
    batch = batch_of(mixed)
    assert batch["kd_transcribed"].tolist() == ROWS.tolist()
    batch["supervisions"]["text"] = [TEXTS["c1"], "two z", TEXTS["c3"]]
    hidden = HardRows(student)
    hidden.begin(batch)
    loss = recipe(student, batch)
    hidden.take(batch)
    found = gradients(student, loss)
    texts = list(batch["supervisions"]["text"])
    parts = [recipe(student, batch, slice(i, i + 1)) for i in (0, 2)]
    expected = gradients(student, sum(parts))
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-5)
    assert float(loss) < 0.9 * float(recipe(student, batch))  # which has all rows
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4)
    assert texts[1] == "two z"  # whatever stands in


def test_the_engine_is_as_before_behind_a_forward_pass(
    student, batch_of, mixed, recipe
):
    names = [(get_engine(), n) for n in TRANSDUCER if hasattr(get_engine(), n)]
    names.append((torch.nn.functional, "ctc_loss"))
    before = [getattr(*name) for name in names]
    batch = batch_of(mixed)
    session.begin(batch)  # a forward pass that fails
    assert all(getattr(*n) is not f for n, f in zip(names, before))
    joint(student, batch, recipe)
    assert all(getattr(*n) is f for n, f in zip(names, before))


def test_the_terms_are_of_all_rows_and_the_log_counts_them(
    student, batch_of, mixed, recipe
):
    batch = batch_of(mixed, kd_rnnt_weight=0.5)
    loss, info, hard = joint(student, batch, recipe)
    frames = float((batch["supervisions"]["num_frames"] // 4).sum())
    counts = {n: info[f"kd_{n}_cuts"] / frames for n in ("transcribed", "pseudo")}
    assert counts == {"transcribed": 1, "pseudo": 1}
    assert info["kd_untranscribed_cuts"] == frames
    assert info["kd_hard_frames"] == pytest.approx(2 / 3 * frames)
    assert info["kd_frames"] == 3 * 14  # of the encoder
    assert info["kd_rnnt_frames"] == 2 * 14  # no lattice of what stands in
    expected = hard + 0.5 * (info["kd_ctc_loss"] + info["kd_rnnt_loss"])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_a_training_of_people_alone_logs_no_counts(student, batch_of, cuts, recipe):
    _, info, _ = joint(student, batch_of(cuts), recipe)
    assert set(info) == {"kd_ctc_loss", "kd_frames"}


def test_losses_that_can_not_be_told_apart_are_refused(
    student, batch_of, mixed, recipe
):
    batch = batch_of(mixed)
    loss = recipe(student, batch)
    with pytest.raises(KDError, match="does not call kd.begin"):
        session.joint_loss(loss, MetricsTracker(), student, batch)
    session.begin(batch)
    recipe(student, batch)
    session.current().distillation.hard_rows._calls = 0  # as a loss of another name
    with pytest.raises(KDError, match="none of the losses .*icefall-kd label"):
        session.joint_loss(loss, MetricsTracker(), student, batch)
    session.begin(batch)
    with pytest.raises(KDError, match="reduction=mean"):
        torch.nn.functional.ctc_loss(
            torch.zeros(5, 3, 4), torch.ones(3, 1), torch.full((3,), 5), torch.ones(3)
        )
    session.detach()
    student.attention_decoder = torch.nn.Linear(1, 1)
    with pytest.raises(KDError, match="attention decoder"):
        HardRows(student).begin(batch)
