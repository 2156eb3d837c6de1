"""Simple targets: the teacher's distribution, through a store, a token map and teachers
that are averaged."""

import pytest
import torch
from lhotse import load_manifest

from icefall_kd.errors import KDError
from icefall_kd.kinds import KINDS
from icefall_kd.kinds.simple import SimpleKind
from icefall_kd.tap import ModelTap
from icefall_kd.targets import TargetWriter
from icefall_kd.targets.dump import dump_targets
from icefall_kd.targets.model_input import collate_input
from icefall_kd.targets.reading import collate_targets
from icefall_kd.teacher.teacher import Teacher

LENGTHS = {"c1": 61, "c2": 33, "c3": 47}


def by_hand(model, cut):
    """(T, V), log softmax of simple_am_proj(encoder output) of a cut alone."""
    with ModelTap(model) as tap, torch.no_grad():
        out = tap.encode(*collate_input([cut]))
        return model.simple_am_proj(out.encoder_out)[0].log_softmax(-1)


@pytest.fixture
def stored(make_cut, make_fingerprint, make_model, tmp_path):
    """Cuts with simple targets of a form, and their teacher."""

    def make(form, **forms):
        fingerprint = make_fingerprint(further_kinds={"simple": form}, **forms)
        model, cuts = make_model(), [make_cut(i, n) for i, n in LENGTHS.items()]
        teacher = Teacher([model], with_ctc=bool(fingerprint.ctc), with_simple=True)
        manifest = tmp_path / "kd.jsonl.gz"
        with TargetWriter(manifest, tmp_path / "kd", fingerprint) as writer:
            dump_targets(cuts, teacher, writer, num_workers=0)
        return load_manifest(manifest), model

    return make


@pytest.mark.parametrize("forms", [{}, {"ctc": ""}], ids=["with ctc", "alone"])
def test_a_store_holds_the_softmax_of_simple_am_proj(stored, forms):
    cuts, model = stored("dense", **forms)
    targets = collate_targets(list(cuts))
    assert set(targets.parts) == {"simple"} | ({"ctc"} if not forms else set())
    for row, cut in enumerate(cuts):
        expected = by_hand(model, cut)
        n = int(targets.lens[row])
        found = targets.parts["simple"][row, :n]
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
        if not forms:  # it is no copy of the CTC head's
            assert (targets.parts["ctc"][row, :n] - expected).abs().max() > 0.05


def test_a_sparse_store_keeps_the_most_probable_tokens(stored):
    cuts, model = stored("top:3")
    for cut in cuts:
        rows = collate_targets([cut], kinds=["simple"]).parts["simple"]
        top = by_hand(model, cut).topk(3)
        assert torch.equal(rows.indices[0].sort(-1)[0], top.indices.sort(-1)[0])
        kept = rows.log_probs[0].sort(-1, descending=True)[0].exp()
        torch.testing.assert_close(kept, top.values.exp(), atol=0.01, rtol=0)


def test_a_truncated_cut_has_its_part_of_the_targets(stored):
    cuts, _ = stored("dense")
    cut = next(iter(cuts))
    whole = collate_targets([cut]).parts["simple"][0]
    part = cut.truncate(offset=0.2, duration=0.28, preserve_id=True)
    targets = collate_targets([part])
    n = int(targets.mask[0].sum())
    assert 0 < n < len(whole)
    rows = targets.parts["simple"][0][targets.mask[0]]
    starts = range(len(whole) - n + 1)
    (start,) = (i for i in starts if torch.equal(whole[i : i + n], rows))
    assert start == 5  # 0.2 s of 40 ms


def test_tokens_are_mapped_as_those_of_ctc_targets_are():
    values = torch.randn(2, 3, 5).log_softmax(-1)
    token_ids = torch.tensor([0, 3, 1, 4, 2])
    mapped = KINDS["simple"].map_tokens(values, token_ids)
    assert torch.equal(mapped[..., token_ids], values)
    assert torch.equal(mapped, KINDS["ctc"].map_tokens(values, token_ids))


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_several_teachers_are_averaged(make_model, features, weights):
    models = [make_model(seed=1), make_model(seed=2)]
    teacher = Teacher(models, weights, with_simple=True)
    found = teacher.targets(*features).parts["simple"].exp()
    shares = torch.tensor(weights or (1.0, 1.0))
    alone = [
        Teacher([m], with_simple=True).targets(*features).parts["simple"].exp()
        for m in models
    ]
    expected = sum(p * s for p, s in zip(alone, shares / shares.sum()))
    for row, n in enumerate((14, 9, 4)):
        torch.testing.assert_close(found[row, :n], expected[row, :n])
    assert (alone[0] - alone[1]).abs().max() > 0.05


def test_no_simple_targets_unless_asked(make_model, features):
    assert set(Teacher([make_model()]).targets(*features).parts) == {"ctc"}


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "without simple joiner's logits"),
        (torch.zeros(4, 7), "the simple joiner's logits of cut c1 .* \\(4, 7\\)"),
        (torch.full((4, 5), float("nan")), "simple joiner's logits on cut c1 are not"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(value, words):
    with pytest.raises(KDError, match=words):
        SimpleKind("dense", 5, 0).check(value, "c1")
