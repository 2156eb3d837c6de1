"""The best labels of CTC outputs, and how they score a transcript."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from icefall_kd.kinds.codec import Codec
from icefall_kd.losses.transcript import LEAST_TAIL, best_labels, transcript_scores
from icefall_kd.types import SparseDistribution

V = 5


def frames_of(n, t, seed=0, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, t, V, generator=g, dtype=dtype)


def mask_of(*rows):
    return torch.tensor([[c == "x" for c in row] for row in rows])


def labels_of(*rows, blank_id=0):
    width = max(map(len, rows))
    rows = [[blank_id, *row, *[blank_id] * (width - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int64)


def collapse(path, blank_id=0):
    return [k for k, _ in itertools.groupby(path) if k != blank_id]


def naive_score(log_probs, mask, labels, blank_id=0):
    """-log of the sum over all paths through the frames of the mask."""
    frames = [row for row, kept in zip(log_probs, mask.tolist()) if kept]
    total = 0.0
    for path in itertools.product(range(V), repeat=len(frames)):
        if collapse(path, blank_id) == labels:
            total += math.exp(sum(float(f[k]) for f, k in zip(frames, path)))
    return -math.log(total) if total else math.inf


MASKS = mask_of("xxxxx", "xx.x.", ".xxx.", "x....")
TRANSCRIPTS = [[3, 3], [1], [4, 2, 4], [2, 1]]  # the last has no path


@pytest.mark.parametrize("blank_id", [0, 1])
def test_the_score_is_the_sum_over_all_paths(blank_id):
    transcripts = [[3, 3], [4], [4, 2, 4], [2, 3]]
    logits = frames_of(4, 5)
    labels = labels_of(*transcripts, blank_id=blank_id)
    found = transcript_scores(logits, MASKS, labels, V, blank_id)
    log_probs = logits.log_softmax(-1)
    expected = [
        naive_score(log_probs[i], MASKS[i], transcripts[i], blank_id) for i in range(4)
    ]
    assert found.dtype == torch.float64 and expected[3] == math.inf
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_it_is_ctc_loss_where_all_frames_count():
    logits, lens = frames_of(3, 7), torch.tensor([7, 5, 6])
    transcripts = [[3, 3, 1], [1], [4, 2]]
    mask = torch.arange(7) < lens[:, None]
    found = transcript_scores(logits, mask, labels_of(*transcripts), V)
    for i, labels in enumerate(transcripts):
        rows = logits[i : i + 1, : lens[i]].log_softmax(-1).transpose(0, 1)
        size = torch.tensor([len(labels)])
        expected = F.ctc_loss(rows, torch.tensor([labels]), lens[i : i + 1], size)
        torch.testing.assert_close(found[i], expected * len(labels))


def test_what_is_outside_the_mask_changes_nothing():
    logits = frames_of(4, 5)
    labels = labels_of(*TRANSCRIPTS)
    found = transcript_scores(logits, MASKS, labels, V)
    garbage = logits.masked_fill(~MASKS.unsqueeze(-1), math.nan)
    assert torch.equal(found, transcript_scores(garbage, MASKS, labels, V))
    wider = F.pad(labels, (0, 3))
    assert torch.equal(found, transcript_scores(logits, MASKS, wider, V))
    assert best_labels(logits, MASKS) == best_labels(garbage, MASKS)


def test_labels_may_be_int32_as_those_of_k2():
    labels = labels_of(*TRANSCRIPTS)
    for rows in (frames_of(4, 5), sparse_of(frames_of(4, 5), 2)):
        found = transcript_scores(rows, MASKS, labels.int(), V)
        assert torch.equal(found, transcript_scores(rows, MASKS, labels, V))


def test_no_gradient_is_asked_for():
    logits = frames_of(4, 5).requires_grad_()
    found = transcript_scores(logits, MASKS, labels_of(*TRANSCRIPTS), V)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = frames_of(4, 5).to(dtype)
    labels = labels_of(*TRANSCRIPTS)
    found = transcript_scores(logits, MASKS, labels, V)
    assert found.dtype == torch.float32
    exact = transcript_scores(logits.double(), MASKS, labels, V)
    torch.testing.assert_close(found.double(), exact)


def test_a_row_without_frames_or_without_a_path_is_infinite():
    labels = labels_of([3, 3], [1], [])
    mask = mask_of("xx...", ".....", ".....")
    found = transcript_scores(frames_of(3, 5), mask, labels, V)
    assert found.tolist() == [math.inf] * 3


def test_a_transcript_without_labels_is_all_blank():
    logits, mask = frames_of(2, 5), mask_of("xxxxx", "xx.x.")
    found = transcript_scores(logits, mask, labels_of([], []), V)
    blanks = -logits.log_softmax(-1)[..., 0] * mask
    torch.testing.assert_close(found, blanks.sum(1))


@pytest.mark.parametrize("value", [-math.inf, -1e4])
def test_impossible_labels_are_finite_or_infinite_and_not_nan(value):
    logits = frames_of(4, 5)
    logits[..., 2] = value
    found = transcript_scores(logits, MASKS, labels_of([2], [1], [1, 2], [1]), V)
    assert not found.isnan().any()
    assert found[1].isfinite() and found[3].isfinite()
    assert (found[[0, 2]] > 1000).all()


# Sparse


def sparse_of(logits, k):
    log_probs, indices = logits.log_softmax(-1).topk(k)
    tail = (1 - log_probs.exp().sum(-1)).clamp(min=0).log()
    return SparseDistribution(indices, log_probs, tail)


def test_all_tokens_kept_are_dense():
    logits, labels = frames_of(4, 5), labels_of(*TRANSCRIPTS)
    sparse = sparse_of(logits, V)
    sparse.log_tail = torch.full_like(sparse.log_tail, -math.inf)
    found = transcript_scores(sparse, MASKS, labels, V)
    torch.testing.assert_close(found, transcript_scores(logits, MASKS, labels, V))
    assert best_labels(sparse, MASKS) == best_labels(logits, MASKS)


def test_tokens_that_are_not_kept_share_the_tail():
    logits, labels = frames_of(4, 5), labels_of(*TRANSCRIPTS)
    sparse = sparse_of(logits, 2)
    shares = (sparse.log_tail - math.log(V - 2)).unsqueeze(-1).expand(-1, -1, V)
    dense = shares.scatter(-1, sparse.indices, sparse.log_probs)
    torch.testing.assert_close(dense.logsumexp(-1), torch.zeros(4, 5).double())
    found = transcript_scores(sparse, MASKS, labels, V)
    torch.testing.assert_close(found, transcript_scores(dense, MASKS, labels, V))
    assert not torch.allclose(
        found[:3], transcript_scores(logits, MASKS, labels, V)[:3]
    )


def test_the_fill_of_short_rows_is_no_token():
    """It has index 0, as the blank has, and log-probability -inf."""
    logits, labels = frames_of(4, 5), labels_of(*TRANSCRIPTS)
    sparse = sparse_of(logits, 3)
    filled = SparseDistribution(
        F.pad(sparse.indices, (0, 2)),
        F.pad(sparse.log_probs, (0, 2), value=-math.inf),
        sparse.log_tail,
    )
    found = transcript_scores(filled, MASKS, labels, V)
    torch.testing.assert_close(found, transcript_scores(sparse, MASKS, labels, V))
    assert best_labels(filled, MASKS) == best_labels(sparse, MASKS)


def test_a_tail_that_is_stored_as_0_leaves_every_transcript_possible():
    """Dense, the teacher would give it 15 nats or so, and not infinitely many."""
    sparse = SparseDistribution(
        torch.full((1, 4, 1), 3), torch.zeros(1, 4, 1), torch.full((1, 4), -math.inf)
    )
    mask, labels = mask_of("xxxx"), labels_of([3, 2])
    found = float(transcript_scores(sparse, mask, labels, V))
    share = LEAST_TAIL - math.log(V - 1)
    assert found == pytest.approx(-share, abs=1e-2)  # of the path 3 3 3 2


@pytest.mark.parametrize("form", ["top:4", "adaptive:.999:5"])
def test_what_a_store_reads_scores_nearly_as_the_teacher(form):
    logits = frames_of(1, 9, dtype=torch.float32)
    codec = Codec.parse(form)
    stored = codec.decode([codec.encode(logits[0])], [9], V)
    rows = SparseDistribution(*(x.unsqueeze(0) for x in vars(stored).values()))
    mask, best = torch.ones(1, 9, dtype=torch.bool), best_labels(
        logits, mask_of("x" * 9)
    )
    assert best_labels(rows, mask) == best and best[0]
    for labels in (best, [[1, 2, 1]]):
        exact = transcript_scores(logits, mask, labels_of(*labels), V)
        found = transcript_scores(rows, mask, labels_of(*labels), V)
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


# Best labels


@pytest.mark.parametrize("blank_id", [0, 2])
def test_best_labels_are_the_best_path_collapsed(blank_id):
    logits = frames_of(6, 11)
    mask = torch.rand(6, 11) > 0.2
    mask[5] = False
    best = logits.argmax(-1).masked_fill(~mask, blank_id).tolist()
    expected = [collapse(path, blank_id) for path in best]
    assert best_labels(logits, mask, blank_id) == expected
    assert expected[5] == [] and all(expected[:5])


def test_a_gap_separates_equal_labels():
    rows = F.one_hot(torch.tensor([[3, 3, 3, 3]]), V).double()
    assert best_labels(rows, mask_of("xxxx")) == [[3]]
    assert best_labels(rows, mask_of("x.xx")) == [[3, 3]]
