"""``icefall-kd dump`` of hidden layers and without CTC targets; ``quantizer``.

What is expected is put together here from what the teacher's hook says.
"""

import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lhotse import load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.kinds.hidden import OUT, hash_file, load_quantizer, save_quantizer
from icefall_kd.targets import Fingerprint, TargetDataset
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import Pointer
from icefall_kd.tokens import load_tokenizer

pytestmark = pytest.mark.usefixtures("loaded_once")

FRAMES = {"c1": 10, "c2": 21, "c3": 14, "c4": 7}  # of the encoder's output
T50 = {"c1": 20, "c2": 41, "c3": 27, "c4": 13}  # of the stacks'
NONE = ("--keep", "none")


@pytest.fixture
def teacher(teacher_exp):
    return teacher_exp.models["epoch-2"]


@pytest.fixture
def rows_of(teacher, hear):
    """The rows of a layer on one cut, folded by hand."""

    def rows(cut, layer):
        out = hear(teacher, cut, [layer])
        if layer == OUT:
            return out.encoder_out[0, :, None]
        vectors = list(out.hidden[layer][0])
        assert len(vectors) == T50[cut.id]
        vectors += vectors[-1:] * (len(vectors) % 2)
        pairs = [torch.stack(vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
        return torch.stack(pairs)

    return rows


@pytest.fixture
def parts(tmp_path):
    """All parts of each cut's record."""

    def read(name="out"):
        cuts = load_manifest(tmp_path / f"{name}.jsonl.gz")
        return [(cut, Pointer.of_cut(cut).read()) for cut in cuts]

    return read


@pytest.fixture
def quantizer_words(in_cuts, tmp_path, teacher_words):
    """``quantizer``, trained for a moment; a word given twice counts the last time."""
    pytest.importorskip("multi_quantization")

    def words(*more, out=tmp_path / "q.pt", layer=1, cuts=in_cuts):
        options = [
            "--layer",
            layer,
            "--num-codebooks",
            2,
            "--iters",
            2,
            "--num-vectors",
            600,
        ]
        return ["quantizer", cuts, out, *teacher_words, *options, *more]

    return words


@pytest.fixture
def untrained(tmp_path):
    """The file of a quantizer that was not trained."""
    package = pytest.importorskip("multi_quantization")

    def make(dim, codes=2, seed=0):
        torch.manual_seed(seed)
        path = tmp_path / f"q-{dim}-{codes}-{seed}.pt"
        save_quantizer(package.Quantizer(dim, 256, codes), path)
        return path

    return make


# Without CTC targets


@pytest.mark.parametrize("form", ["collapsed", "path:top:4"])
def test_lattices_are_kept_alone(
    invoke, dump_words, tmp_path, teacher, bpe_models, hear, parts, form
):
    sp = load_tokenizer(bpe_models.a)
    words = (*NONE, "--keep-lattice", form, "--bpe-model", bpe_models.a)
    assert invoke(*dump_words(*words, "--s-range", 4)).code == 0
    found = Fingerprint.read(tmp_path / "out_kd")
    assert (found.ctc, found.lattice, found.hidden) == ("", form, "")
    codec = found.kinds["lattice"].codec
    for cut, kept in parts():
        y = sp.encode(cut.supervisions[0].text, out_type=int)
        lattice = hear(teacher, cut, y=y, s_range=4)
        assert kept == {"lattice": codec.encode(lattice, cut.id)}
        targets = collate_targets([cut], kinds=["lattice"])
        assert targets.parts.get("ctc") is None and targets.lens.tolist() == [
            FRAMES[cut.id]
        ]
        assert targets.parts["lattice"][0].labels.tolist() == y


@pytest.mark.parametrize("layers", [(1, OUT), (OUT,), (0, 1)])
def test_hidden_layers_are_kept_alone(
    invoke, dump_words, tmp_path, rows_of, parts, layers
):
    text = ",".join(f"{layer}:half" for layer in layers)
    assert invoke(*dump_words(*NONE, "--keep-hidden", text)).code == 0
    found = Fingerprint.read(tmp_path / "out_kd")
    assert (found.ctc, found.lattice, found.hidden) == ("", "", text)
    for cut, kept in parts():
        assert list(kept) == [f"hidden.{layer}" for layer in layers]
        for layer in layers:
            rows = rows_of(cut, layer).numpy().astype(np.float16)
            assert rows.shape[0] == FRAMES[cut.id]
            assert kept[f"hidden.{layer}"] == rows.tobytes()


def test_hidden_layers_in_batches_are_as_alone(invoke, dump_words, parts, tmp_path):
    """But for rounding, which float16 may widen to its last bit."""
    words = (*NONE, "--keep-hidden", "0:half,1:half,out:half")
    alone = tmp_path / "alone.jsonl.gz"
    assert invoke(*dump_words(*words, out=alone)).code == 0
    assert invoke(*dump_words(*words, "--max-duration", 9)).code == 0
    for (cut, _), (plain, _) in zip(parts(), parts("alone"), strict=True):
        assert cut.id == plain.id
        found = collate_targets([cut], kinds=["hidden"]).parts["hidden"]
        expected = collate_targets([plain], kinds=["hidden"]).parts["hidden"]
        assert set(found) == set(expected) == {0, 1, OUT}
        for layer, rows in expected.items():
            torch.testing.assert_close(found[layer], rows, rtol=2**-9, atol=1e-3)


def test_all_parts_stand_beside_each_other(
    invoke, dump_words, tmp_path, teacher, bpe_models, hear, rows_of, parts
):
    sp = load_tokenizer(bpe_models.a)
    words = ("--keep", "top:3", "--keep-lattice", "collapsed", "--s-range", 3)
    words = (*words, "--keep-hidden", "0:half", "--bpe-model", bpe_models.a)
    assert invoke(*dump_words(*words)).code == 0
    kinds = Fingerprint.read(tmp_path / "out_kd").kinds
    ctc, lattice = kinds["ctc"].codec, kinds["lattice"].codec
    for cut, kept in parts():
        y = sp.encode(cut.supervisions[0].text, out_type=int)
        logits = hear(teacher, cut).ctc_logits[0]
        nodes = hear(teacher, cut, y=y, s_range=3)
        assert kept == {
            "ctc": ctc.encode(logits, cut.id),
            "lattice": lattice.encode(nodes, cut.id),
            "hidden.0": rows_of(cut, 0).half().numpy().tobytes(),
        }


def test_what_was_dumped_without_ctc_can_be_read_in_a_batch(
    invoke, dump_words, rows_of, tmp_path
):
    assert invoke(*dump_words(*NONE, "--keep-hidden", "1:half,out:half")).code == 0
    cuts = load_manifest(tmp_path / "out.jsonl.gz").to_eager()
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    targets = batch["kd_targets"]
    assert targets.parts.get("ctc") is None and targets.lens.tolist() == [21, 14, 10, 7]
    for i, cut in enumerate(batch["supervisions"]["cut"]):
        for layer in (1, OUT):
            rows = rows_of(cut, layer).half().float()
            assert torch.equal(targets.parts["hidden"][layer][i, : len(rows)], rows)


def test_a_teacher_without_ctc_head_is_dumped_without_ctc_targets(
    invoke, refused, dump_words, another_exp, hear, bpe_models, parts, tmp_path
):
    folder, model = another_exp(use_ctc=False)
    sp = load_tokenizer(bpe_models.a)
    words = ("--exp-dir", folder, "--bpe-model", bpe_models.a)
    words = (*words, "--keep-lattice", "collapsed", "--keep-hidden", "1:half")
    assert "no CTC head" in refused(*dump_words(*words))
    assert invoke(*dump_words(*words, *NONE)).code == 0
    codec = Fingerprint.read(tmp_path / "out_kd").kinds["lattice"].codec
    for cut, kept in parts():
        y = sp.encode(cut.supervisions[0].text, out_type=int)
        nodes = hear(model, cut, ctc=False, y=y, s_range=5)
        assert kept["lattice"] == codec.encode(nodes, cut.id)
        assert len(kept["hidden.1"]) == FRAMES[cut.id] * 2 * 24 * 2


def test_statistics_without_ctc_targets(invoke, dump_words):
    words = (*NONE, "--keep-hidden", "1:half,out:half", "--stats")
    done = invoke(*dump_words(*words))
    assert done.code == 0
    lines = [line.split("  ") for line in done.out.splitlines()[1:]]
    rows = {words[0]: words[-1].strip() for words in lines}
    assert rows["cuts"] == "4" and rows["frames"] == "52"
    assert rows["bytes a frame, hidden.1"] == "96.00"  # 2 vectors of 24 halves
    assert rows["bytes a frame, hidden.out"] == "48.00"
    assert rows["forms"] == "1:half,out:half"
    assert not [name for name in rows if "ctc" in name or "blank" in name]


def test_simple_targets_are_kept_beside_ctc_targets_or_alone(
    invoke, refused, dump_words, tmp_path, parts, teacher, hear
):
    plain = dump_words("--keep", "top:3")
    assert invoke(*plain).code == 0
    ctc = {cut.id: kept["ctc"] for cut, kept in parts()}
    assert "further_kinds" not in Fingerprint.read(tmp_path / "out_kd").to_dict()
    both = ("--keep", "top:3", "--keep-simple", "adaptive:.99:4")
    words = "made with simple '' and this teacher has 'adaptive:0.99:4'"
    assert words in refused(*dump_words(*both))
    done = invoke(*dump_words(*both, "--overwrite", "--stats"))
    assert done.code == 0 and "entropy, simple (nats a frame)" in done.out
    assert "entropy, ctc (nats a frame)" in done.out
    assert {cut.id: kept["ctc"] for cut, kept in parts()} == ctc
    assert all(set(kept) == {"ctc", "simple"} for _, kept in parts())
    assert invoke(*dump_words(*NONE, "--keep-simple", "dense", "--overwrite")).code == 0
    for cut, kept in parts():
        assert set(kept) == {"simple"}
        out = hear(teacher, cut)
        expected = teacher.simple_am_proj(out.encoder_out)[0].log_softmax(-1)
        found = collate_targets([cut]).parts["simple"][0]
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_another_form_leaves_the_store(invoke, refused, dump_words, parts):
    half = (*NONE, "--keep-hidden", "1:half")
    assert invoke(*dump_words(*half)).code == 0
    for other, words in [
        ((*NONE, "--keep-hidden", "out:half"), "with hidden '1:half' and this teacher"),
        (("--keep", "top:3"), "made with ctc '' and this teacher has 'top:3'"),
    ]:
        assert words in refused(*dump_words(*other))
    assert invoke(*dump_words("--keep", "top:3", "--overwrite")).code == 0
    assert all(set(kept) == {"ctc"} for _, kept in parts())


@pytest.mark.parametrize(
    "more, words",
    [
        (NONE, "would keep nothing"),
        ((*NONE, "--keep-lattice", "collapsed"), "give --bpe-model"),
        (("--keep-simple", "half"), "half"),
        (("--keep-hidden", "7:half"), "stack 7, and the encoder has 2 stacks"),
        (("--keep-hidden", "1"), "the hidden layer is '1'"),
        (("--keep-hidden", "x:half"), "the hidden layer is 'x:half'"),
        (("--keep-hidden", "1:half,1:half"), "hidden layer 1 occurs twice"),
    ],
    ids="nothing lattice simple stack form layer twice".split(),
)
def test_dump_refuses_what_it_cannot_keep(refused, dump_words, more, words):
    assert words in refused(*dump_words(*more))


def test_dump_refuses_a_quantizer_that_is_not_there(refused, dump_words):
    pytest.importorskip("multi_quantization")
    words = dump_words("--keep-hidden", "1:nowhere.pt")
    assert "nowhere.pt can't be read" in refused(*words)


# Codes


def test_a_trained_quantizers_codes_are_dumped(
    invoke, dump_words, quantizer_words, rows_of, parts, tmp_path
):
    path = tmp_path / "q.pt"
    done = invoke(*quantizer_words())
    assert done.code == 0
    found = load_quantizer(path)
    assert (found.dim, found.num_codebooks, found.codebook_size) == (24, 2, 256)
    words = (*NONE, "--keep-hidden", f"1:{path},out:half")
    assert invoke(*dump_words(*words)).code == 0
    assert Fingerprint.read(tmp_path / "out_kd").hidden == (
        f"1:mvq:2:{hash_file(path)},out:half"
    )
    copy = tmp_path / "out_kd" / "quantizer.1.pt"
    assert copy.read_bytes() == path.read_bytes()
    path.unlink()  # the store has its own
    for cut, kept in parts():
        rows = rows_of(cut, 1)
        codes = found.encode(rows, as_bytes=False)
        assert codes.shape == (FRAMES[cut.id], 2, 2)
        assert kept["hidden.1"] == codes.numpy().astype(np.uint8).tobytes()
        assert len(kept["hidden.out"]) == FRAMES[cut.id] * 24 * 2
        targets = collate_targets([cut], kinds=["hidden"]).parts["hidden"]
        assert torch.equal(targets[1][0], codes)


def lost(done):
    """The share of the variance that ``quantizer`` tells, in per cent."""
    return float(done.out.split("; ")[1].split(" %")[0])


def test_the_quantizer_tells_what_its_codes_lose(
    invoke, quantizer_words, rows_of, tmp_path, in_cuts
):
    done = invoke(*quantizer_words())
    x = torch.cat([rows_of(c, 1).flatten(0, 1) for c in load_manifest(in_cuts)])
    assert len(x) == 104
    quantizer = load_quantizer(tmp_path / "q.pt")
    read = quantizer.decode(quantizer.encode(x))
    share = (read - x).square().sum() / (x - x.mean(0)).square().sum()
    assert "q.pt: 2 codes a vector of 24, from 104 vectors of layer 1;" in done.out
    assert lost(done) == pytest.approx(100 * float(share), rel=1e-4, abs=0.06)


def test_a_quantizer_that_is_trained_longer_loses_less(invoke, quantizer_words):
    words = quantizer_words("--num-codebooks", 1)
    short, long = (lost(invoke(*words, "--iters", n)) for n in (1, 40))
    assert long < short / 2


@pytest.mark.parametrize("layer, dim", [(0, 16), (OUT, 24)])
def test_a_quantizer_is_of_the_layer_that_is_named(
    invoke, quantizer_words, tmp_path, layer, dim
):
    assert invoke(*quantizer_words(layer=layer)).code == 0
    assert load_quantizer(tmp_path / "q.pt").dim == dim


def test_a_quantizer_is_the_same_for_the_same_seed(
    invoke, quantizer_words, tmp_path, monkeypatch
):
    """Whatever was drawn before. Its training draws from torch and from Python."""
    found, draws = [], []

    def draw():
        draws[-1].append(random.random())
        return draws[-1][-1]

    package = pytest.importorskip("multi_quantization.quantization")
    monkeypatch.setattr(package, "random", SimpleNamespace(random=draw))
    for i in range(2):
        random.seed(i)
        torch.manual_seed(i)
        draws.append([])
        assert invoke(*quantizer_words("--num-codebooks", 1)).code == 0
        found.append(load_quantizer(tmp_path / "q.pt").centers)
    assert torch.equal(*found)
    assert len(draws[0]) > 2 and draws[0] == draws[1]


def test_a_quantizer_is_another_for_another_seed(invoke, quantizer_words, tmp_path):
    found = []
    for seed in (1, 2):
        words = quantizer_words("--num-codebooks", 1, "--seed", seed)
        assert invoke(*words).code == 0
        found.append(load_quantizer(tmp_path / "q.pt").centers)
    assert not torch.equal(*found)


def test_codes_of_several_jobs_are_those_of_one(
    invoke, dump_words, untrained, parts, tmp_path, monkeypatch
):
    words = ("--keep-hidden", f"1:{untrained(24)},0:{untrained(16)}")
    one = tmp_path / "one.jsonl.gz"
    assert invoke(*dump_words(*words, out=one)).code == 0
    for job in range(2):
        jobs = ("--num-jobs", 2, "--job", job)
        assert invoke(*dump_words(*words, *jobs)).code == 0
    found = parts()
    assert len({Pointer.of_cut(cut).file for cut, _ in found}) == 2
    for (cut, kept), (plain, expected) in zip(found, parts("one"), strict=True):
        assert cut.id == plain.id and kept == expected
        assert set(kept) == {"ctc", "hidden.1", "hidden.0"}


def test_a_dump_of_codes_goes_on_with_the_same_quantizer_only(
    invoke, refused, dump_words, untrained, tree_of, tmp_path
):
    first, other = untrained(24), untrained(24, seed=1)
    words = (*NONE, "--keep-hidden")
    assert invoke(*dump_words(*words, f"1:{first}")).code == 0
    before = tree_of(tmp_path / "out_kd")
    done = invoke(*dump_words(*words, f"1:{first}"))
    assert done.code == 0 and tree_of(tmp_path / "out_kd") == before
    error = refused(*dump_words(*words, f"1:{other}"))
    assert hash_file(first) in error and hash_file(other) in error


@pytest.mark.parametrize("layer, dim", [(1, 16), (1, 7), (0, 24), (OUT, 16)])
def test_a_quantizer_of_another_layer_is_refused(
    invoke, dump_words, untrained, tmp_path, layer, dim
):
    """Its vectors are of other length; some lengths divide each other's."""
    words = (*NONE, "--keep-hidden", f"{layer}:{untrained(dim)}")
    done = invoke(*dump_words(*words))
    assert done.code == 1 and done.err[-1].startswith("icefall_kd: error: ")
    assert str(dim) in done.err[-1] and "quantizer" in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_codes_need_their_package(refused, dump_words, untrained, monkeypatch):
    path = untrained(24)
    monkeypatch.setitem(sys.modules, "multi_quantization", None)
    error = refused(*dump_words("--keep-hidden", f"1:{path}"))
    assert "`pip install multi_quantization`" in error


@pytest.mark.parametrize(
    "more, words",
    [
        (("--layer", 7), "stack 7, and the encoder has 2 stacks"),
        (("--layer", "last"), "the hidden layer is 'last:half'"),
        (("--num-codebooks", 3), "--num-codebooks is 3: give 1, 2, 4, 8, 16 or 32"),
        (("--num-codebooks", 0), "--num-codebooks is 0"),
        (("--iters", 0), "--iters is 0"),
        (("--num-vectors", 599), "--num-vectors 599"),
        (("--epoch", 7), "epoch-7.pt does not exist"),
    ],
    ids="stack layer codes none iters vectors epoch".split(),
)
def test_quantizer_refuses_options(refused, quantizer_words, more, words):
    assert words in refused(*quantizer_words(*more))


def test_quantizer_refuses_missing_cuts_and_package(
    refused, quantizer_words, monkeypatch
):
    assert "nowhere.jsonl does not exist" in refused(
        *quantizer_words(cuts="nowhere.jsonl")
    )
    monkeypatch.setitem(sys.modules, "multi_quantization", None)
    assert "`pip install multi_quantization`" in refused(*quantizer_words())


def test_quantizer_does_not_take_its_input_for_its_output(
    invoke, quantizer_words, in_cuts
):
    before = in_cuts.read_bytes()
    done = invoke(*quantizer_words("--num-codebooks", 1, out=in_cuts))
    assert in_cuts.read_bytes() == before
    assert done.code == 1 and str(in_cuts) in done.err[-1]
