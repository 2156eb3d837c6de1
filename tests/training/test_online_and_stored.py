"""One teacher, batch and flags: the same terms and gradients, asked online or stored.

The store is that of ``icefall-kd dump``, read by the session's own dataset. Run it with
``-s`` for the largest relative difference of each term.
"""

import random
from typing import Any, Dict, List, NamedTuple

import pytest
import torch
from calm_model import calm
from lhotse import CutSet
from lhotse.dataset import K2SpeechRecognitionDataset
from zipformer.utils import MetricsTracker

from icefall_kd.cli import cli
from icefall_kd.errors import KDError
from icefall_kd.training import session

# Some with nodes that the path passes with a probability below 1/510.
CUTS = {
    "c1": (261, "zero one two three four five six"),
    "c2": (97, "seven eight nine"),
    "c3": (33, "six"),
}
HIDDEN = "out:half,0:half"


def ctc(**flags):
    return {"ctc": 1.0, **{f"kd_ctc_{name}": x for name, x in flags.items()}}


def rnnt(form="nodes", **flags):
    return {"kd_rnnt_weight": 1.0, "kd_rnnt_form": form, **flags}


FRAMES = ("all", "non-blank", "symmetric", "entropy", "confidence")
FULL_SUM = {"kd_full_sum_weight": 1.0}
EQUAL = {"kd_rnnt_node_weighting": "equal"}
PATH = {"kd_teacher_path_only": 1}
SIMPLE = {"kd_simple_weight": 1.0}
LAYERS = {"kd_hidden_weight": 1.0, "kd_hidden_layers": "out,0:1"}

DENSE = [
    *(ctc(frame_weighting=f, delay=d) for f in FRAMES for d in (0, 2)),
    *(ctc(frame_weighting=f, delay=2) | {"temperature": 2.0} for f in FRAMES[::3]),
    *(ctc(frame_weighting=f, symbol_weight=4.0) for f in FRAMES),
    ctc(symbol_weight=0.0) | {"temperature": 2.0},
    *(rnnt(form) for form in ("nodes", "collapsed", "mean_u", "total")),
    rnnt("sampled_u"),
    *(rnnt(kd_rnnt_blank_weight=b) for b in (0.0, 2.0)),
    *(rnnt(form, **EQUAL) for form in ("nodes", "collapsed", "mean_u", "sampled_u")),
    *(rnnt(form) | {"temperature": 3.0} for form in ("nodes", "mean_u", "total")),
    *(rnnt(form, kd_rnnt_shift=2) for form in ("nodes", "mean_u")),
    rnnt("collapsed", kd_rnnt_shift=1, **EQUAL),
    FULL_SUM,
    FULL_SUM | {"kd_full_sum_form": "one-sided"},
    SIMPLE,
    SIMPLE | {"temperature": 2.0},
    LAYERS,
    LAYERS | {"kd_hidden_distance": "cosine"},
    ctc() | SIMPLE | rnnt() | FULL_SUM | LAYERS,
]


class Store(NamedTuple):
    """How targets are kept, the terms, and how far these may be from those online."""

    ctc: str
    lattice: str
    terms: List[Dict[str, Any]]
    s_range: int = 5
    tolerance: float = 1e-3  # of float16, and of a byte for an occupancy


ARCS = [rnnt("collapsed"), rnnt("collapsed", **EQUAL), FULL_SUM]
SPARSE = "adaptive:.9999:24"
STORES = {
    "dense": Store("dense", "dense", DENSE),
    "dense, s_range 3": Store(
        "none", "dense", [rnnt("mean_u"), rnnt(**EQUAL), FULL_SUM], s_range=3
    ),
    "path": Store(
        "dense",
        "path:dense",
        [rnnt(form, **PATH) for form in ("nodes", "collapsed", "mean_u", "total")]
        + [rnnt(**EQUAL, **PATH), FULL_SUM | PATH],
    ),
    "collapsed": Store("none", "collapsed", ARCS),
    # A byte for a square root, and symbols that are in the tail.
    "sparse arcs": Store("none", "top:1", ARCS, tolerance=5e-3),
    "sparse": Store(
        SPARSE,
        SPARSE,
        [ctc(frame_weighting=f, delay=d) for f in FRAMES for d in (0, 2)]
        + [ctc(symbol_weight=w) for w in (0.0, 4.0)]
        + [SIMPLE]
        + [rnnt(), rnnt(**EQUAL), rnnt("sampled_u", **EQUAL), rnnt(kd_rnnt_shift=2)]
        + [rnnt(kd_rnnt_blank_weight=0.0)]
        + ARCS,
        tolerance=5e-3,
    ),
    "sparse, temperature 2": Store(
        f"{SPARSE}@2",
        f"{SPARSE}@2",
        [ctc() | {"temperature": 2.0}, rnnt() | {"temperature": 2.0}],
        tolerance=5e-3,
    ),
}


@pytest.fixture
def student(make_model):
    return calm(make_model(seed=3, vocab_size=25), training=False)


@pytest.fixture
def peaky(teacher_exp, tmp_path):
    """The teacher's folder, its heads sharper and mostly blank, as of a trained one."""
    folder = tmp_path / "peaky"
    folder.mkdir()
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    state = checkpoint["model"]
    for name, scale, blank in (
        ("ctc_output.1", 4, 9.7),
        ("joiner.output_linear", 3, 2),
    ):
        state[f"{name}.weight"] *= scale
        state[f"{name}.bias"][0] += blank
    torch.save(checkpoint, folder / "epoch-2.pt")
    return folder


@pytest.fixture
def off(bpe_models):
    """Flags that switch all terms off."""
    flags = {"ctc": 0.0, "hard": 0.0, "temperature": 1.0}
    return {**flags, "bpe_model": str(bpe_models.a)}


@pytest.fixture
def bare(make_cut, tmp_path):
    path = tmp_path / "in.jsonl.gz"
    cuts = [make_cut(name, n, text=text) for name, (n, text) in CUTS.items()]
    CutSet.from_cuts(cuts).to_file(path)
    return path


@pytest.fixture
def dumped(bare, teacher_exp, peaky, bpe_models, tmp_path):
    """The cuts with the targets that ``icefall-kd dump`` makes."""

    def dump(keep, lattice, s_range):
        out = tmp_path / "kd.jsonl.gz"
        words = ["dump", bare, out, "--recipe", teacher_exp.recipe, "--keep", keep]
        words += ["--exp-dir", peaky, "--epoch", 2, "--num-threads", 1]
        words += ["--use-averaged-model", 0, "--bpe-model", bpe_models.a]
        words += ["--keep-lattice", lattice, "--s-range", s_range]
        words += ["--keep-hidden", HIDDEN, "--num-workers", 0]
        words += ["--keep-simple", keep]
        with pytest.raises(SystemExit) as e:
            cli([str(w) for w in words], prog_name="icefall-kd")
        assert e.value.code == 0
        return CutSet.from_file(out).to_eager()

    return dump


@pytest.fixture
def taught(student, sp):
    """The KD terms of one batch, and their gradient towards all parameters."""

    def run(params, cuts):
        session.attach(params, student)
        batch = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]
        supervisions, info = batch["supervisions"], MetricsTracker()
        random.seed(0)
        losses = student(
            x=batch["inputs"],
            x_lens=supervisions["num_frames"],
            y=sp.encode(supervisions["text"], out_type=int),
            prune_range=3,
        )
        torch.manual_seed(0)
        loss = session.joint_loss(losses[1].sum(), info, student, batch)
        student.zero_grad()
        loss.backward()
        grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        return dict(info), torch.cat(grads)

    return run


@pytest.mark.parametrize("name", STORES)
def test_stored_targets_teach_what_the_teacher_teaches_online(
    name, dumped, bare, taught, make_params, online, peaky, off
):
    kept = STORES[name]
    stored = dumped(kept.ctc, kept.lattice, kept.s_range)
    cuts = CutSet.from_file(bare).to_eager()
    apart = {}
    for flags in kept.terms:
        flags = {**off, **flags}
        teacher = {"kd_teacher_exp_dir": str(peaky), "kd_teacher_s_range": kept.s_range}
        asked = taught(online(**flags, **teacher), cuts)
        read = taught(make_params(**flags, vocab_size=25), stored)
        given = {k: v for k, v in flags.items() if off.get(k) != v}
        key = " ".join(f"{k.removeprefix('kd_')}={v}" for k, v in given.items())
        assert list(asked[0]) == list(read[0]), key
        for term, value in asked[0].items():
            if term.endswith("_frames"):
                assert read[0][term] == value > 0, (key, term)
            else:
                assert value > 1e-3, (key, term)
                difference = abs(read[0][term] - value) / value
                apart[f"{key}: {term}"] = difference
        change = (read[1] - asked[1]).norm() / asked[1].norm()
        assert asked[1].norm() > 1e-3
        apart[f"{key}: gradient"] = float(change)
    print(f"\n{name} ({kept.ctc}, {kept.lattice}, s_range {kept.s_range})")
    for key, difference in apart.items():
        print(f"  {difference:.1e} {key}")
    far = {key: x for key, x in apart.items() if not x < kept.tolerance}
    assert not far


@pytest.mark.parametrize("lattice, fits", [("dense", False), ("path:top:3", True)])
def test_the_best_path_alone_is_that_of_the_store_or_refused(
    dumped, student, make_params, off, lattice, fits
):
    """An online teacher's --kd-teacher-path-only has no say in what a store keeps."""
    cuts = dumped("none", lattice, 5)
    flags = {**off, **rnnt(**PATH), "vocab_size": 25}
    session.attach(make_params(**flags), student)
    dataset = K2SpeechRecognitionDataset()
    if fits:
        assert "lattice" in session.wrap_dataset(dataset, cuts).kinds
        return
    words = "--kd-teacher-path-only is true .* --keep-lattice path:dense, .* false"
    with pytest.raises(KDError, match=words) as e:
        session.wrap_dataset(dataset, cuts)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("theirs", ["a", "b", ""])
def test_an_online_teacher_of_other_symbols_is_refused(
    online, student, teacher_exp, bpe_models, off, tmp_path, theirs
):
    """All have 25; the teacher's checkpoint says which file its symbols are in."""
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    copy = tmp_path / "bpe.model"  # the same symbols in another file are the same
    if theirs:
        copy.write_bytes(getattr(bpe_models, theirs).read_bytes())
    checkpoint["bpe_model"] = str(copy)
    torch.save(checkpoint, tmp_path / "epoch-2.pt")
    given = online(**{**off, **ctc()}, kd_teacher_exp_dir=str(tmp_path))
    if theirs != "b":
        session.attach(given, student)
        return
    words = "tokens are those of .* tokens or their order differ: .* --bpe-model"
    with pytest.raises(KDError, match=words) as e:
        session.attach(given, student)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("place", ["of the student", "of the teacher"])
def test_a_relative_path_in_a_checkpoint_is_of_the_teachers_recipe(
    online, student, teacher_exp, bpe_models, off, tmp_path, monkeypatch, place
):
    """The student's working folder has other symbols by the same name, its corpus's."""
    relative = "data/lang_bpe_500/bpe.model"
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    folder = tmp_path / "teacher" / "zipformer" / "exp"
    folder.mkdir(parents=True)
    torch.save({**checkpoint, "bpe_model": relative}, folder / "epoch-2.pt")
    root = tmp_path / place.split()[-1]
    (root / relative).parent.mkdir(parents=True)
    (root / relative).write_bytes(bpe_models.b.read_bytes())
    (tmp_path / "student").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "student")
    given = online(**{**off, **ctc()}, kd_teacher_exp_dir="../teacher/zipformer/exp")
    if place == "of the student":
        session.attach(given, student)
        return
    with pytest.raises(KDError, match=f"trained with {root / relative}, whose tokens"):
        session.attach(given, student)
