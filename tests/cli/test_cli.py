"""``icefall-kd``: dump and student end to end, doctor, and every refusal.

The commands run in this process, where an error that is no refusal would come out
as itself; one refusal runs as a user would run it.
"""

import argparse
import gzip
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset
from zipformer.bin.train import load_checkpoint_if_available

from icefall_kd import ModelTap, build_student
from icefall_kd.cli import cli
from icefall_kd.cli.student_size import parse_changes
from icefall_kd.cli.torchrun import job_of
from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint
from icefall_kd.targets.fingerprint import hash_state_dict
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.targets.writer import TargetWriter
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.teacher.recipe import flags_of, model_names
from icefall_kd.tokens import hash_tokens, load_tokenizer, token_names
from icefall_kd.training import session

LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 33}
MAIN = "from icefall_kd.cli import main\nmain()"


@pytest.fixture
def student_words(tmp_path, teacher_words):
    def words(*more):
        return ["student", *teacher_words, "--student-dir", tmp_path / "student", *more]

    return words


@pytest.fixture
def check_dump(read_targets):
    return lambda *args: _check_dump(read_targets, *args)


def _check_dump(read_targets, out, in_cuts, teacher):
    """Each cut of ``in_cuts``, with what the teacher says on it alone."""
    found, given = list(load_manifest(out)), list(load_manifest(in_cuts))
    assert [c.id for c in found] == [c.id for c in given]
    # Zipformer takes other kernels for frozen parameters, another last bit.
    with ModelTap(teacher.requires_grad_(False)) as hook:
        for cut, plain in zip(found, given, strict=True):
            x = torch.from_numpy(plain.load_features()).unsqueeze(0)
            logits = hook.encode(x, torch.tensor([x.size(1)])).ctc_logits[0]
            expected = logits.log_softmax(-1).half().float().log_softmax(-1)
            assert torch.equal(read_targets(cut), expected)
            cut.custom = None
            assert cut.to_dict() == plain.to_dict()


# dump


def test_dump_end_to_end(
    invoke, dump_words, in_cuts, tmp_path, teacher, bpe_models, make_model, check_dump
):
    out = tmp_path / "out.jsonl.gz"
    done = invoke(*dump_words("--bpe-model", bpe_models.a))
    assert done.code == 0 and "4 cuts with targets" in done.out
    check_dump(out, in_cuts, teacher)
    assert Fingerprint.read(tmp_path / "out_kd") == Fingerprint(
        teacher=hash_state_dict(teacher.state_dict()),
        tokens=hash_tokens(token_names(load_tokenizer(bpe_models.a))),
        vocab_size=25,
        blank_id=0,
        subsampling_factor=4,
        frame_shift=0.04,
        sampling_rate=8000,
        num_features=20,
        feature_type="kaldi-fbank",
    )
    # What was dumped can be trained on.
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    flags = "--kd-ctc-weight 0.8 --kd-hard-weight 0.2 --kd-temperature 2"
    params = {
        **vars(parser.parse_args(flags.split())),
        "vocab_size": 25,
        "blank_id": 0,
        "bpe_model": str(bpe_models.a),
    }
    session.attach(params, make_model(vocab_size=25))
    cuts = load_manifest(out).to_eager()
    batch = session.wrap_dataset(K2SpeechRecognitionDataset(), cuts)[cuts]
    assert batch["kd_targets"].lens.tolist() == [21, 14, 10, 7]


def targets_of(out):
    """All parts of each cut's record, by id."""
    return {c.id: Pointer.of_cut(c).read() for c in load_manifest(out)}


def test_dump_in_batches_gives_each_cut_its_own_targets(
    invoke, dump_words, tmp_path, encoder_frames, read_targets
):
    """The same as alone, but for rounding, which float16 may widen to its last bit."""
    assert invoke(*dump_words("--max-duration", 2.0)).code == 0
    assert invoke(*dump_words(out=tmp_path / "alone.jsonl.gz")).code == 0
    alone = load_manifest(tmp_path / "alone.jsonl.gz").to_eager()
    for cut in load_manifest(tmp_path / "out.jsonl.gz"):
        rows = read_targets(cut)
        assert rows.shape == (encoder_frames(LENGTHS[cut.id]), 25)
        torch.testing.assert_close(
            rows, read_targets(alone[cut.id]), rtol=2**-9, atol=1e-3
        )


def test_dump_again_changes_nothing(
    invoke, dump_words, in_cuts, tmp_path, teacher, check_dump
):
    assert invoke(*dump_words()).code == 0
    before = (tmp_path / "out_kd" / "targets.bin").read_bytes()
    lines = gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes())
    done = invoke(*dump_words())
    assert done.code == 0 and len(before) > 0
    assert (tmp_path / "out_kd" / "targets.bin").read_bytes() == before
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == lines
    check_dump(tmp_path / "out.jsonl.gz", in_cuts, teacher)


def test_dump_goes_on_where_it_was_cut_short(
    invoke, dump_words, in_cuts, tmp_path, teacher, make_cut, check_dump
):
    """A cut whose features are lost ends the first run; the second has them."""
    broken = tmp_path / "broken.jsonl.gz"
    cuts = list(load_manifest(in_cuts))
    lost = make_cut("c3", LENGTHS["c3"])
    lost.features.storage_path = "nowhere"
    CutSet.from_cuts([*cuts[:2], lost, cuts[3]]).to_file(broken)
    done = invoke(*dump_words("--num-workers", 0, cuts=broken))
    assert done.code == 1 and "c3" in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()
    records = tmp_path / "out_kd" / "targets.bin"
    before = records.read_bytes()
    lines = (tmp_path / "out.jsonl.gz.partial").read_text("utf8").splitlines()
    assert 0 < len(lines) < 3 and len(before) > 0
    assert invoke(*dump_words()).code == 0
    assert records.read_bytes().startswith(before)
    check_dump(tmp_path / "out.jsonl.gz", in_cuts, teacher)


def test_dump_overwrites_on_demand(
    invoke, dump_words, in_cuts, tmp_path, teacher_exp, teacher, check_dump
):
    assert invoke(*dump_words("--epoch", 1)).code == 0
    assert invoke(*dump_words("--overwrite")).code == 0
    check_dump(tmp_path / "out.jsonl.gz", in_cuts, teacher)


def test_dump_of_another_teacher_leaves_the_store(invoke, refused, dump_words):
    assert invoke(*dump_words("--epoch", 1)).code == 0
    error = refused(*dump_words())
    assert "made with teacher" in error and "--overwrite" in error


def test_dump_takes_the_averaged_model_unless_told(
    invoke, dump_words, in_cuts, tmp_path, teacher_exp, check_dump
):
    assert invoke(*dump_words("--use-averaged-model", "true")).code == 0
    averaged, _ = load_recipe_model(
        teacher_exp.recipe, teacher_exp.folder, epoch=2, use_averaged_model=True
    )
    check_dump(tmp_path / "out.jsonl.gz", in_cuts, averaged)


@pytest.mark.parametrize(
    "more, words",
    [
        (("--epoch", 7), "epoch-7.pt does not exist"),
        (("--iter", 3), "need 1"),
        (("--recipe", "nowhere"), "holds no train.py"),
        (("--exp-dir", "nowhere"), "nowhere/epoch-2.pt does not exist"),
        (("--max-duration", 0), "--max-duration is 0, and must be a number above 0"),
        (("--bpe-model", "nowhere.model"), "nowhere.model can't be read"),
        (("--avg", 0), "--avg"),
        (("--keep", "topp:3"), "form is 'topp:3'"),
        (("--keep", "adaptive:2:9"), "mass must be above 0"),
        (("--keep-lattice", "collapsed"), "give --bpe-model"),
        (("--num-jobs", 2, "--job", 2), "give --job 0 to 1"),
        (("--job", 1), "--job is 1 and --num-jobs 1"),
        (("--num-jobs", 0), "--num-jobs"),
    ],
    ids="epoch iter recipe exp-dir duration bpe avg keep mass lattice job one-job "
    "no-jobs".split(),
)
def test_dump_refuses_options(refused, dump_words, more, words):
    assert words in refused(*dump_words(*more))


def cuts_without_features(cuts, make_cut):
    return [c.drop_features() for c in cuts]


def cuts_of_80_features(cuts, make_cut):
    return [make_cut("wide", 61, num_features=80)]


def one_cut_of_80_features(cuts, make_cut):
    return [*cuts, make_cut("wide", 61, num_features=80)]


def padded_cuts(cuts, make_cut):
    return [c.pad(duration=2.0) for c in cuts]


def a_short_cut(cuts, make_cut):
    return [make_cut("short", 8), *cuts]


@pytest.mark.parametrize(
    "change, words",
    [
        (cuts_without_features, ["c1", "has no features"]),
        (cuts_of_80_features, ["80 features", "takes 20"]),
        (lambda cuts, make_cut: [], ["holds no cuts"]),
        (padded_cuts, ["MixedCut"]),
    ],
    ids="no-features other-features empty mixed".split(),
)
def test_dump_refuses_cuts(refused, dump_words, tmp_path, make_cut, change, words):
    cuts = change([make_cut(i, n) for i, n in LENGTHS.items()], make_cut)
    path = tmp_path / "other.jsonl"
    CutSet.from_cuts(cuts).to_file(path)
    error = refused(*dump_words(cuts=path))
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    "change, word",
    [
        (one_cut_of_80_features, "wide"),
        (a_short_cut, "short"),
    ],
    ids=["one-wide", "short"],
)
@pytest.mark.parametrize("max_duration", [0.01, 100])
def test_dump_refuses_one_cut_of_many(
    invoke, dump_words, tmp_path, make_cut, change, word, max_duration
):
    cuts = change([make_cut(i, n) for i, n in LENGTHS.items()], make_cut)
    CutSet.from_cuts(cuts).to_file(tmp_path / "other.jsonl")
    done = invoke(
        *dump_words("--max-duration", max_duration, cuts=tmp_path / "other.jsonl")
    )
    assert done.code == 1 and word in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()


@pytest.mark.parametrize(
    "max_duration",
    [
        100,
        0.01,
    ],
    ids=["same-batch", "another-batch"],
)
def test_dump_refuses_a_duplicate(invoke, dump_words, tmp_path, in_cuts, max_duration):
    path = tmp_path / "twice.jsonl"
    text = gzip.decompress(in_cuts.read_bytes()).decode("utf8")
    path.write_text(text + text.splitlines()[1] + "\n", "utf8")
    done = invoke(*dump_words("--max-duration", max_duration, cuts=path))
    assert done.code == 1 and "cut id c2 occurs twice" in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()


@pytest.mark.parametrize(
    "damage",
    [None, lambda data: data[: len(data) // 2], lambda data: b"no manifest"],
    ids="missing torn text".split(),
)
def test_dump_refuses_a_damaged_manifest(refused, dump_words, in_cuts, damage):
    if damage is None:
        in_cuts.unlink()
    else:
        in_cuts.write_bytes(damage(in_cuts.read_bytes()))
    assert str(in_cuts) in refused(*dump_words())


def test_dump_refuses_missing_features(invoke, dump_words, tmp_path):
    (array,) = tmp_path.glob("feats/**/c2.npy")
    array.unlink()
    done = invoke(*dump_words())
    assert done.code == 1
    assert done.err[-1].startswith("icefall_kd: error: ")
    assert str(array) in done.err[-1] and "[extra info]" not in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()


def test_dump_does_not_take_its_input_for_its_output(
    invoke, dump_words, in_cuts, tree_of, tmp_path
):
    before = in_cuts.read_bytes()
    done = invoke(*dump_words(out=in_cuts))
    if done.code == 1:
        assert in_cuts.read_bytes() == before
    else:
        assert all(c.has_custom(FIELD) for c in load_manifest(in_cuts))


# What is kept


@pytest.mark.parametrize("keep", ["top:3", "adaptive:.9:5@2", "sampled:7"])
def test_dump_keeps_what_it_is_told(
    invoke, dump_words, in_cuts, tmp_path, teacher, keep
):
    assert invoke(*dump_words("--keep", keep)).code == 0
    codec = Fingerprint.read(tmp_path / "out_kd").kinds["ctc"].codec
    with ModelTap(teacher) as hook:
        for cut in load_manifest(tmp_path / "out.jsonl.gz"):
            x = torch.from_numpy(cut.load_features()).unsqueeze(0)
            logits = hook.encode(x, torch.tensor([x.size(1)])).ctc_logits[0]
            kept = codec.encode(logits, cut.id)
            assert Pointer.of_cut(cut).read() == {"ctc": kept}


@pytest.mark.parametrize("form", ["collapsed", "top:4"])
def test_dump_keeps_lattices(
    invoke, dump_words, in_cuts, tmp_path, teacher, bpe_models, form
):
    sp = load_tokenizer(bpe_models.a)
    words = ("--keep-lattice", form, "--bpe-model", bpe_models.a, "--s-range", 4)
    assert invoke(*dump_words(*words)).code == 0
    found = Fingerprint.read(tmp_path / "out_kd")
    assert (found.ctc, found.lattice, found.s_range) == ("dense", form, 4)
    codec = found.kinds["lattice"].codec
    with ModelTap(teacher) as hook:
        for cut in load_manifest(tmp_path / "out.jsonl.gz"):
            x = torch.from_numpy(cut.load_features()).unsqueeze(0)
            y = [sp.encode(cut.supervisions[0].text, out_type=int)]
            out = hook.encode(x, torch.tensor([x.size(1)]))
            part = Pointer.of_cut(cut).read()["lattice"]
            assert part == codec.encode(hook.lattice(out, y, 4), cut.id)
            assert codec.decode(part, 25).labels.tolist() == y[0]


def test_dump_of_lattices_in_batches_is_as_alone(
    invoke, dump_words, tmp_path, bpe_models, in_cuts
):
    """Occupancies are kept in steps of 1/255."""
    words = ("--keep-lattice", "collapsed", "--bpe-model", bpe_models.a)
    alone = tmp_path / "alone.jsonl.gz"
    assert invoke(*dump_words(*words, "--s-range", 99, out=alone)).code == 0
    assert invoke(*dump_words(*words, "--s-range", 99, "--max-duration", 9)).code == 0
    codec = Fingerprint.read(tmp_path / "out_kd").kinds["lattice"].codec
    other = targets_of(alone)
    for name, parts in targets_of(tmp_path / "out.jsonl.gz").items():
        a = codec.decode(parts["lattice"], 25)
        b = codec.decode(other[name]["lattice"], 25)
        assert torch.equal(a.labels, b.labels)
        width = b.occupancy.size(1)
        difference = a.occupancy[:, :width] - b.occupancy
        assert difference.abs().max() <= 1.01 / 255


@pytest.mark.parametrize("text", ["", "  ", None])
def test_dump_of_lattices_refuses_a_cut_without_transcript(
    invoke, dump_words, tmp_path, make_cut, bpe_models, text
):
    path = tmp_path / "other.jsonl"
    CutSet.from_cuts([make_cut("c1", 47), make_cut("bare", 61, text=text)]).to_file(
        path
    )
    words = ("--keep-lattice", "collapsed", "--bpe-model", bpe_models.a)
    done = invoke(*dump_words(*words, cuts=path))
    assert done.code == 1 and "cut bare has no transcript" in done.err[-1]
    assert not (tmp_path / "out.jsonl.gz").exists()
    assert invoke(*dump_words(cuts=path, out=tmp_path / "ctc.jsonl")).code == 0


@pytest.mark.parametrize("unknown, code", [(1, 0), (2, 1), (3, 1)])
def test_tokens_that_know_nothing_of_the_transcripts_are_refused(
    invoke, dump_words, tmp_path, make_cut, bpe_models, unknown, code
):
    """One such cut is trained as the recipe trains it."""
    path, out = tmp_path / "other.jsonl", tmp_path / "out.jsonl.gz"
    texts = ["零一"] * unknown + ["ein"] * (3 - unknown)
    cuts = [make_cut(f"c{i}", 47, text=text) for i, text in enumerate(texts)]
    CutSet.from_cuts(cuts).to_file(path)
    words = ("--keep-lattice", "collapsed", "--bpe-model", bpe_models.a)
    done = invoke(*dump_words(*words, cuts=path))
    assert done.code == code and out.exists() == (code == 0)
    if code:
        assert f"cover nothing of {unknown} of the 3 transcripts" in done.err[-1]


@pytest.mark.parametrize("keep", ["dense", "none"])
def test_a_cut_of_more_labels_than_frames_goes_without_a_lattice(
    invoke, dump_words, tmp_path, make_cut, bpe_models, caplog, keep
):
    """As it goes without training: icefall leaves it out."""
    path, out = tmp_path / "other.jsonl", tmp_path / "out.jsonl.gz"
    cuts = [
        make_cut("c1", 47, text="ein"),
        make_cut("long", 33, text="ein zwei ein zwei ein"),
        make_cut("c3", 33, text="zwei"),
    ]
    CutSet.from_cuts(cuts).to_file(path)
    words = ("--keep", keep, "--keep-lattice", "collapsed")
    words += ("--bpe-model", bpe_models.a, "--max-duration", 10)
    with caplog.at_level("WARNING"):
        done = invoke(*dump_words(*words, cuts=path))
    assert done.code == 0
    assert "1 of 3 cuts have more labels than frames, long the first" in caplog.text
    found = collate_targets(list(CutSet.from_file(out)))
    assert [x is None for x in found.parts["lattice"]] == [False, True, False]
    assert found.lens.tolist() == [10, 7, 7] and found.mask.sum(1).tolist() == [
        10,
        7,
        7,
    ]
    # The others have what they have without it.
    CutSet.from_cuts([cuts[0], cuts[2]]).to_file(tmp_path / "two.jsonl")
    alone = tmp_path / "alone.jsonl.gz"
    done = invoke(*dump_words(*words, cuts=tmp_path / "two.jsonl", out=alone))
    assert done.code == 0
    two = collate_targets(list(CutSet.from_file(alone)))
    for a, b in zip(
        two.parts["lattice"], (found.parts["lattice"][0], found.parts["lattice"][2])
    ):
        assert torch.equal(a.occupancy, b.occupancy)
    assert invoke(*dump_words(*words, cuts=path)).code == 0  # all is there already


@pytest.mark.parametrize(
    "more, words",
    [
        (("--keep", "top:4"), "made with ctc 'top:3' and this teacher has 'top:4'"),
        ((), "made with ctc 'top:3' and this teacher has 'dense'"),
    ],
)
def test_dump_in_another_form_leaves_the_store(
    invoke, refused, dump_words, more, words
):
    assert invoke(*dump_words("--keep", "top:3")).code == 0
    assert words in refused(*dump_words(*more))


def test_dump_prints_statistics(invoke, dump_words):
    done = invoke(*dump_words("--keep", "top:3", "--stats"))
    assert done.code == 0
    rows = {li[:30].strip(): li.split()[-1] for li in done.out.splitlines()}
    assert rows["cuts"] == "4" and rows["frames"] == "52"
    assert rows["forms"] == "top:3"
    assert 3 < float(rows["bytes a frame, ctc"]) < 12
    again = invoke(*dump_words("--keep", "top:3", "--stats"))
    assert again.out == done.out


def test_dump_overwrites_in_another_form_and_prints_its_statistics(invoke, dump_words):
    assert invoke(*dump_words("--stats")).code == 0
    done = invoke(*dump_words("--overwrite", "--keep", "top:3", "--stats"))
    assert done.code == 0 and "top:3" in done.out


# Several jobs


@pytest.fixture
def many(make_cut, tmp_path, monkeypatch):
    """24 cuts of odd lengths, in stretches of 3 s."""
    monkeypatch.setattr(sys.modules["icefall_kd.targets.batches"], "STRETCH", 3.0)
    path = tmp_path / "many.jsonl"
    lengths = [9 + (37 * i) % 83 for i in range(24)]
    cuts = CutSet.from_cuts(make_cut(f"m{i}", n) for i, n in enumerate(lengths))
    cuts.to_file(path)
    return path


@pytest.mark.parametrize("num_jobs", [2, 5])
def test_dump_with_several_jobs_equals_one_bit_for_bit(
    invoke, dump_words, many, tmp_path, num_jobs, read_targets
):
    batches = ("--max-duration", 1.5)
    one = tmp_path / "one.jsonl.gz"
    assert invoke(*dump_words(*batches, cuts=many, out=one)).code == 0
    for job in range(num_jobs):
        words = ("--num-jobs", num_jobs, "--job", job, "--num-workers", job % 2)
        done = invoke(*dump_words(*batches, *words, cuts=many))
        assert done.code == 0
        assert (tmp_path / "out.jsonl.gz").exists() == (job == num_jobs - 1)
        if job < num_jobs - 1:
            assert f"icefall-kd combine --num-jobs {num_jobs}" in done.out
    assert f"24 cuts with targets of {num_jobs} jobs" in done.out
    found = load_manifest(tmp_path / "out.jsonl.gz").to_eager()
    plain = load_manifest(one).to_eager()
    assert [c.id for c in found] == [c.id for c in plain]
    # Four stretches: the fifth job has nothing to do.
    assert len({Pointer.of_cut(c).file for c in found}) == min(num_jobs, 4)
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(read_targets(a), read_targets(b))


def test_jobs_are_combined_by_hand(invoke, dump_words, many, tmp_path):
    out = tmp_path / "out.jsonl.gz"
    jobs = ("--num-jobs", 2)
    for job in (1, 0):
        assert invoke(*dump_words(*jobs, "--job", job, cuts=many)).code == 0
    expected = targets_of(out)
    out.unlink()
    done = invoke("combine", many, out, *jobs)
    assert done.code == 0 and "24 cuts with targets of 2 jobs" in done.out
    assert targets_of(out) == expected and len(expected) == 24
    assert list(expected) == [c.id for c in load_manifest(many)]


def test_combine_before_all_jobs_are_done_is_refused(
    invoke, refused, dump_words, many, tmp_path, in_cuts
):
    words = ("--num-jobs", 2, "--job", 0)
    assert invoke(*dump_words(*words, cuts=many)).code == 0
    out = tmp_path / "out.jsonl.gz"
    error = refused("combine", many, out, "--num-jobs", 2)
    assert "of job 1 does not exist" in error and "--num-jobs 2 --job 1" in error
    assert invoke(*dump_words("--num-jobs", 2, "--job", 1, cuts=many)).code == 0
    assert "of none of the 2 jobs" in refused("combine", in_cuts, out, "--num-jobs", 2)
    assert "does not exist" in refused("combine", "nowhere", out, "--num-jobs", 2)


@pytest.fixture
def cut_short_after(monkeypatch):
    """Let the store refuse what comes behind so many cuts."""

    def begin(count):
        left, append = [count], TargetWriter.append

        def some(self, *args):
            if not left[0]:
                raise KDError("cut short here")
            left[0] -= 1
            return append(self, *args)

        monkeypatch.setattr(TargetWriter, "append", some)
        return lambda: monkeypatch.setattr(TargetWriter, "append", append)

    return begin


def test_jobs_go_on_with_other_batches_and_share_the_cuts_as_before(
    invoke, dump_words, many, tmp_path, cut_short_after, read_targets
):
    """The same cut in the same job; targets within float16 of those of one run."""
    jobs, out = ("--num-jobs", 3), tmp_path / "out.jsonl.gz"
    whole = tmp_path / "whole.jsonl.gz"
    for job in range(3):
        words = (*jobs, "--job", job, "--max-duration", 1.5)
        assert invoke(*dump_words(*words, cuts=many, out=whole)).code == 0
    expected = load_manifest(whole).to_eager()
    assert len({Pointer.of_cut(c).file for c in expected}) == 3
    for job, counts in enumerate([(1, 2, 1), (0, 3), (4,)]):
        words = (*jobs, "--job", job)
        for count, max_duration in zip(counts, (1.5, 0.01, 7)):
            go_on = cut_short_after(count)
            done = invoke(
                *dump_words(*words, "--max-duration", max_duration, cuts=many)
            )
            assert done.code == 1 and "cut short here" in done.err[-1]
            go_on()
        partial = tmp_path / f"out.job-{job}-of-3.jsonl.gz.partial"
        assert len(partial.read_bytes().splitlines()) == sum(counts)
        done = invoke(*dump_words(*words, "--max-duration", 100, cuts=many))
        assert done.code == 0
    assert "24 cuts with targets of 3 jobs" in done.out
    found = list(load_manifest(out))
    assert [c.id for c in found] == [c.id for c in load_manifest(many)]
    for cut in found:
        other = expected[cut.id]
        assert Pointer.of_cut(cut).file == Pointer.of_cut(other).file
        a, b = read_targets(cut), read_targets(other)
        torch.testing.assert_close(a, b, rtol=2**-9, atol=1e-3)


# In processes of their own: what dump_words's fixtures set is set here again.
DUMP = """
import importlib
from icefall_kd.cli import main
importlib.import_module("icefall_kd.targets.batches").STRETCH = 3.0
main()
"""


@pytest.fixture
def one_process(invoke, dump_words, many, tmp_path, bpe_models):
    """Options of a dump of ``many``, and the targets that one process makes."""
    words = ("--bpe-model", bpe_models.a, "--max-duration", 1.5, "--keep", "top:4")
    words = (*words, "--keep-hidden", "1:half")
    one = tmp_path / "one.jsonl.gz"
    assert invoke(*dump_words(*words, cuts=many, out=one)).code == 0
    return words, targets_of(one)


@pytest.fixture
def check_processes(many, tmp_path, one_process, bpe_models):
    """Two jobs' manifest is there, and of one process's targets to the last bit."""

    def check():
        out = tmp_path / "out.jsonl.gz"
        assert list(targets_of(out)) == [c.id for c in load_manifest(many)]
        assert targets_of(out) == one_process[1]
        names = {Pointer.of_cut(c).file for c in load_manifest(out)}
        assert names == {"targets.0-of-2.bin", "targets.1-of-2.bin"}
        symbols = (tmp_path / "out_kd/tokens.txt").read_text("utf8").splitlines()
        assert symbols == token_names(load_tokenizer(bpe_models.a))
        left = [*tmp_path.rglob(".tmp*"), *tmp_path.rglob("*.partial")]
        assert left == []

    return check


@pytest.mark.slow
def test_two_jobs_at_once_equal_one_bit_for_bit(
    dump_words, many, one_process, check_processes
):
    started = []
    for job in range(2):
        jobs = ("--num-jobs", 2, "--job", job)
        words = dump_words(*one_process[0], *jobs, cuts=many)
        command = [sys.executable, "-c", DUMP, *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, **pipes))
    done = [process.communicate(timeout=600) for process in started]
    assert [p.returncode for p in started] == [0, 0], done
    assert any("24 cuts with targets of 2 jobs" in out for out, _ in done)
    check_processes()


@pytest.fixture
def script(tmp_path):
    """A program that dumps, for torchrun."""
    path = tmp_path / "icefall-kd"
    path.write_text(f"#!{sys.executable}\n{DUMP}")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_two_processes_of_torchrun_equal_one_bit_for_bit(
    dump_words, many, script, one_process, check_processes
):
    words = dump_words(*one_process[0], cuts=many)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", 2, "--no_python", script, *words]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert "24 cuts with targets of 2 jobs" in done.stdout
    check_processes()


@pytest.mark.slow
def test_two_launchers_of_torchrun_equal_one_process_bit_for_bit(
    dump_words, many, script, one_process, check_processes
):
    """As on two nodes: each has one process, which is number 0 of its node."""
    words = dump_words(*one_process[0], cuts=many)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2]
        command += ["--nproc_per_node", 1, "--node_rank", node, "--master_port", port]
        command += ["--master_addr", "localhost", "--no_python", script, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(list(map(str, command)), text=True, **pipes))
    done = [process.communicate(timeout=600) for process in started]
    assert [p.returncode for p in started] == [0, 0], done
    assert any("24 cuts with targets of 2 jobs" in out for out, _ in done)
    check_processes()


def test_under_torchrun_each_process_is_a_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert job_of(1, 0) == (3, 4)
    assert job_of(2, 1) == (1, 2)  # as told
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert job_of(1, 0) == (0, 1)


@pytest.mark.slow
def test_a_dump_killed_30_times_goes_on_to_the_same_targets(
    invoke, dump_words, many, tmp_path, in_child
):
    """SIGKILL when a random share of the records is there, and a random while on."""
    words = ("--max-duration", 1.5)
    done = tmp_path / "done.jsonl.gz"
    rng = random.Random(0)

    def kill_at(records, size, pause):
        while not (records.is_file() and records.stat().st_size >= size):
            time.sleep(1e-4)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGKILL)

    def child(out, *kill):
        def quietly():
            if kill:
                threading.Thread(target=kill_at, args=kill, daemon=True).start()
            try:
                cli([str(w) for w in dump_words(*words, cuts=many, out=out)])
            except SystemExit as e:
                os._exit(e.code or 0)

        return in_child(quietly)

    assert child(done) == 0
    expected = targets_of(done)
    size = (tmp_path / "done_kd/targets.bin").stat().st_size
    kills = []
    for i in range(6):
        out = tmp_path / f"killed-{i}.jsonl.gz"
        records = tmp_path / f"killed-{i}_kd/targets.bin"
        for share in sorted(rng.random() for _ in range(5)):
            status = child(out, records, share * size, rng.uniform(0, 0.02))
            kills.append(status == -signal.SIGKILL)
        assert invoke(*dump_words(*words, cuts=many, out=out)).code == 0
        assert targets_of(out) == expected
        assert [c.id for c in load_manifest(out)] == [c.id for c in load_manifest(many)]
    assert len(kills) == 30 and any(kills)  # the others were done already


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_number_of_workers_does_not_matter(
    invoke, dump_words, many, tmp_path, num_workers
):
    words = ("--max-duration", 1.5)
    other = tmp_path / "other.jsonl.gz"
    assert invoke(*dump_words(*words, cuts=many)).code == 0
    words = (*words, "--num-workers", num_workers)
    assert invoke(*dump_words(*words, cuts=many, out=other)).code == 0
    assert targets_of(other) == targets_of(tmp_path / "out.jsonl.gz")


def test_a_refusal_as_a_user_sees_it(run_python, dump_words, tmp_path, tree_of):
    before = tree_of(tmp_path)
    done = run_python(MAIN, *dump_words("--epoch", 7))
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: the checkpoint ")
    assert "epoch-7.pt does not exist" in line
    assert tree_of(tmp_path) == before


# student


NARROW = ("--set", "encoder-dim=8,12", "--set", "encoder-unmasked-dim=8,8")


def test_student_end_to_end(
    invoke, student_words, tmp_path, teacher, teacher_exp, recipe, features
):
    done = invoke(*student_words(*NARROW, "--set", "num-encoder-layers=1,2"))
    folder = tmp_path / "student"
    assert done.code == 0 and f"--exp-dir {folder} --start-epoch 2" in done.out
    files = ["epoch-1.pt", "student_account.txt", "student_flags"]
    assert sorted(p.name for p in folder.iterdir()) == files

    changes = {
        "encoder_dim": "8,12",
        "encoder_unmasked_dim": "8,8",
        "num_encoder_layers": "1,2",
    }
    settings = teacher_exp.settings
    expected, _ = build_student(teacher, settings, changes, recipe.get_model)
    found, _ = load_recipe_model(teacher_exp.recipe, folder, epoch=1)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name

    # The flags give the recipe's parser the same model, and training starts from it.
    parser = recipe.get_parser()
    recipe.AsrDataModule.add_arguments(parser)
    words = (folder / "student_flags").read_text().split()
    args = parser.parse_args([*words, "--exp-dir", str(folder), "--start-epoch", "2"])
    params = recipe.get_params()
    params.update(vars(args))
    params.update(vocab_size=25, blank_id=0, sos_id=1, eos_id=1, exp_dir=folder)
    model = recipe.get_model(params)
    load_checkpoint_if_available(params=params, model=model, model_avg=None)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert params.batch_idx_train == 0

    checkpoint = torch.load(folder / "epoch-1.pt", weights_only=False)
    assert not [k for k in checkpoint if k.startswith("kd")]
    assert set(checkpoint["model"]) == set(expected.state_dict())


def test_student_says_how_much_smaller_it_is(invoke, student_words, teacher_exp):
    done = invoke(*student_words(*NARROW))
    (row,) = (li.split() for li in done.out.splitlines() if li.startswith("all "))
    count = sum(p.numel() for p in teacher_exp.models["epoch-2"].parameters())
    a, b = (int(n.replace(",", "")) for n in row[1:3])
    assert a == count and b < a and row[3] == f"{b / a:.2f}"


def test_a_random_student_depends_on_its_seed(
    invoke, student_words, tmp_path, teacher_exp
):
    found = []
    for seed in (1, 1, 2):
        words = student_words(*NARROW, "--init", "random", "--seed", seed)
        assert invoke(*words).code == 0
        model, _ = load_recipe_model(teacher_exp.recipe, tmp_path / "student", epoch=1)
        found.append(hash_state_dict(model.state_dict()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "more, words",
    [
        (("--epoch", 7), "epoch-7.pt does not exist"),
        (("--recipe", "nowhere"), "holds no train.py"),
        (("--set", "encoder-dims=8,8"), "no setting 'encoder_dims'"),
        (("--set", "encoder-dim"), "not of the form NAME=VALUE"),
        (("--set", "encoder-dim="), "not of the form NAME=VALUE"),
        (("--set", "joiner-dim=wide"), "joiner_dim takes a int"),
        (("--set", "encoder-dim=16,32"), "can't be wider"),
        (("--set", "num-encoder-layers=2,4"), "no more layers"),
        (("--set", "vocab-size=30"), "vocab_size is 30 and its teacher's 25"),
        (("--bpe-model", "nowhere.model"), "nowhere.model can't be read"),
    ],
    ids="epoch recipe name form value word wider deeper vocab bpe".split(),
)
def test_student_refuses_options(refused, student_words, more, words):
    assert words in refused(*student_words(*more))


@pytest.mark.parametrize(
    "setting",
    [
        "encoder-dim=8,8",
        "encoder-dim=8,8,8",
        "encoder-dim=wide",
        "num-encoder-layers=x",
        "num-encoder-layers=0,3",
    ],
)
def test_student_refuses_a_setting_that_makes_no_model(refused, student_words, setting):
    assert setting.partition("=")[0].replace("-", "_") in refused(
        *student_words("--set", setting)
    ).replace("-", "_")


def test_student_refuses_another_vocabulary(refused, student_words, bpe_models):
    error = refused(*student_words("--bpe-model", bpe_models.larger))
    assert "has 26 tokens" in error and "teacher 25" in error


def test_student_takes_the_teachers_bpe_model(invoke, student_words, bpe_models):
    assert invoke(*student_words("--bpe-model", bpe_models.a)).code == 0


# Settings and flags


def test_changes_take_the_types_of_the_teachers(make_settings):
    settings = make_settings(dropout=0.1)
    changes = ("joiner-dim=8", "dropout=0.25", "encoder-dim=8,12", " pos-dim=4")
    assert parse_changes(changes, settings) == {
        "joiner_dim": 8,
        "dropout": 0.25,
        "encoder_dim": "8,12",
        "pos_dim": 4,
    }


@pytest.mark.parametrize("word, value", [("0", False), ("False", False), ("1", True)])
def test_a_change_of_a_bool_is_a_bool(make_settings, word, value):
    changes = parse_changes((f"causal={word}",), make_settings())
    assert changes["causal"] is value


def test_a_change_of_a_bool_to_a_word_is_refused(make_settings):
    with pytest.raises(KDError):
        parse_changes(("causal=perhaps",), make_settings())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"encoder_dim": "8,12"},
        {"decoder_dim": 512, "query_head_dim": "32"},
        {"use_cr_ctc": True},
    ],
    ids="as-it-is narrow package-default cr-ctc".split(),
)
def test_flags_give_the_recipes_parser_the_settings(recipe, make_settings, changes):
    """The digits recipe has defaults of its own, which the flags must undo."""
    settings = make_settings(**changes)
    names = model_names(recipe)
    args = recipe.get_parser().parse_args(flags_of(settings, names).split())
    expected = {n: settings.get(n, default) for n, default in names.items()}
    assert {n: getattr(args, n) for n in names} == expected


# doctor


def test_doctor_finds_what_is_installed(invoke):
    from icefall_kd.rnnt import get_engine

    done = invoke("doctor")
    assert done.code == 0 and done.err == []
    rows = {line.split()[0]: line.split() for line in done.out.splitlines()}
    assert rows["torch"][1] == torch.__version__.partition("+")[0] or (
        rows["torch"][1] == torch.__version__
    )
    assert rows["lhotse"][1][0].isdigit()
    assert done.out.splitlines()[-1] == f"transducer engine: {get_engine().__name__}"


def test_doctor_without_an_engine(run_python):
    done = run_python(
        "import sys\nsys.argv[1:] = ['doctor']\n" + MAIN, block=["k2", "fast_rnnt"]
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("icefall_kd: error: ") and "k2 and fast_rnnt" in line
    assert "transducer engine: none" in done.stdout
    (row,) = (li for li in done.stdout.splitlines() if li.startswith("fast_rnnt"))
    assert "missing" in row and "install_native.py fast_rnnt" in row


def test_doctor_says_why_a_part_that_is_there_can_not_be_imported(run_python, tmp_path):
    (tmp_path / "icefall").mkdir()
    (tmp_path / "icefall" / "__init__.py").write_text("import no_such_part\n")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    code += "sys.argv[1:] = ['doctor']\n"
    done = run_python(code + MAIN)
    (row,) = (li for li in done.stdout.splitlines() if li.startswith("icefall "))
    assert "broken" in row and "put icefall on PYTHONPATH" not in row
    assert row.endswith(": ModuleNotFoundError: No module named 'no_such_part'")


def test_the_engine_without_an_engine(run_python):
    code = (
        "from icefall_kd.errors import install_excepthook\n"
        "from icefall_kd.rnnt import get_engine\n"
        "install_excepthook()\nget_engine()\n"
    )
    done = run_python(code, block=["k2", "fast_rnnt"])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "neither k2 nor fast_rnnt is installed" in line


def test_the_version(invoke):
    from icefall_kd import __version__

    done = invoke("--version")
    assert done.code == 0 and __version__ in done.out


@pytest.mark.parametrize("command", ["dump", "combine", "student", "doctor"])
def test_help(invoke, command):
    done = invoke(command, "--help")
    assert done.code == 0 and done.out.startswith(f"Usage: icefall-kd {command}")


def test_dump_refuses_a_manifest_torn_beyond_its_first_lines(
    invoke, dump_words, tmp_path, make_cut
):
    path = tmp_path / "long.jsonl.gz"
    cut = make_cut("c", 47)
    CutSet.from_cuts(cut.with_id(f"c{i}") for i in range(3000)).to_file(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = invoke(*dump_words(cuts=path))
    assert done.code == 1 and "long.jsonl.gz can't be read to its end" in done.err[-1]
