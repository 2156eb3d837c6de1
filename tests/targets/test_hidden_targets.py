"""Stores of hidden layers, of lattices, and of both without CTC targets."""

import json
import random

import numpy as np
import pytest
import torch
from lhotse import CutSet, load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset, SimpleCutSampler
from torch.utils.data import DataLoader

from icefall_kd.cli.stats import print_stats
from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import OUT, HiddenCodec, hash_file, save_quantizer
from icefall_kd.targets import TargetDataset, TargetWriter
from icefall_kd.targets.dataset import map_tokens, resample_frames, store_fingerprint
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint
from icefall_kd.types import PrunedLattice, Targets

LENGTHS = {"c1": 33, "c2": 90, "c3": 61, "c4": 12}
FRAMES = {"c1": 7, "c2": 21, "c3": 14, "c4": 1}
HIDDEN = "1:half,out:half"
SHAPES = {1: (2, 6), OUT: (1, 5)}  # R, C


def hidden_of(cut_id, frames=None, shapes=SHAPES):
    """By layer, rows that occur nowhere else."""
    g = torch.Generator().manual_seed(sum(cut_id.encode()))
    n = FRAMES[cut_id] if frames is None else frames
    return {layer: torch.randn(n, *s, generator=g) for layer, s in shapes.items()}


def lattice_of(cut_id, frames=None, s=3):
    g = torch.Generator().manual_seed(sum(cut_id.encode()))
    n = FRAMES[cut_id] if frames is None else frames
    return PrunedLattice(
        torch.arange(s).expand(1, n, s),
        torch.tensor([[0, 0, 2, n]]),
        torch.tensor([[3, 4]]),
        torch.randn(1, n, s, 11, generator=g),
        torch.rand(1, n, s, generator=g),
    )


@pytest.fixture
def cuts(make_cut):
    return [make_cut(name, n) for name, n in LENGTHS.items()]


@pytest.fixture
def opened(tmp_path, make_fingerprint):
    """Open a writer; without CTC targets unless told."""

    def open_writer(name="kd", **kept):
        fingerprint = make_fingerprint(**{"ctc": "", "hidden": HIDDEN, **kept})
        return TargetWriter(tmp_path / f"{name}.jsonl.gz", tmp_path / name, fingerprint)

    return open_writer


@pytest.fixture
def store(opened, make_logits, tmp_path):
    """Store what is kept of ``cuts``; return the cuts that carry it."""

    def make(cuts, name="kd", **kept):
        with opened(name, **kept) as writer:
            for cut in cuts:
                found = hidden_of(cut.id)
                writer.write(
                    cut, make_logits(cut), lattice=lattice_of(cut.id), hidden=found
                )
        return load_manifest(tmp_path / f"{name}.jsonl.gz").to_eager()

    return make


@pytest.fixture
def quantizer():
    package = pytest.importorskip("multi_quantization")
    torch.manual_seed(3)
    return package.Quantizer(6, 256, 4).eval()


def halved(rows):
    return {layer: x.half().float() for layer, x in rows.items()}


KEPT = {
    "hidden": {},
    "ctc-hidden": {"ctc": "dense"},
    "sparse-hidden": {"ctc": "top:11"},
    "lattice": {"hidden": "", "lattice": "collapsed", "s_range": 3},
    "lattice-hidden": {"lattice": "top:3", "s_range": 3},
    "all": {"ctc": "dense", "lattice": "collapsed", "s_range": 3},
}


def kept(*names):
    return pytest.mark.parametrize(
        "kept", [KEPT[n] for n in names or KEPT], ids=names or list(KEPT)
    )


# What is stored


@kept()
def test_each_part_is_stored_as_its_codec_makes_it(cuts, opened, make_logits, kept):
    with opened(**kept) as writer:
        found = [
            writer.write(
                c, make_logits(c), lattice=lattice_of(c.id), hidden=hidden_of(c.id)
            ).read()
            for c in cuts
        ]
        kinds = writer.fingerprint.kinds
    for cut, parts in zip(cuts, found, strict=True):
        expected = {}
        if "ctc" in kinds:
            codec = kinds["ctc"].codec
            expected["ctc"] = codec.encode(make_logits(cut), cut.id)
        if "lattice" in kinds:
            codec = kinds["lattice"].codec
            expected["lattice"] = codec.encode(lattice_of(cut.id), cut.id)
        for codec in kinds["hidden"].codecs if "hidden" in kinds else ():
            rows = hidden_of(cut.id)[codec.layer].numpy()
            expected[f"hidden.{codec.layer}"] = rows.astype(np.float16).tobytes()
        assert parts == expected and list(parts) == list(expected)
        assert parts  # no store keeps nothing


@kept()
def test_a_cuts_frames_and_time_are_those_of_its_parts(cuts, store, kept):
    for cut in store(cuts, **kept):
        pointer = Pointer.of_cut(cut)
        assert pointer.frames == FRAMES[cut.id] and pointer.cut == cut.id
        targets = collate_targets([cut])
        assert targets.lens.tolist() == [FRAMES[cut.id]]
        assert targets.mask.all() and targets.whole.all()
        assert (targets.parts.get("ctc") is None) == (not kept.get("ctc"))


def test_the_manifest_carries_the_sizes_of_the_layers(cuts, store):
    for cut in store(cuts):
        n = FRAMES[cut.id]
        expected = {"hidden.1": n * 2 * 6 * 2, "hidden.out": n * 5 * 2}
        assert cut.custom[FIELD]["sizes"] == expected


def test_rows_with_a_graph_and_of_half_precision_are_stored(cuts, opened):
    rows = halved(hidden_of("c3"))
    graph = {layer: x.clone().requires_grad_() for layer, x in rows.items()}
    half = {layer: x.half() for layer, x in rows.items()}
    with opened() as writer:
        a = writer.write(cuts[2], hidden=graph).read()
        assert a == writer.encoder.encode(cuts[2], hidden=half).parts


def test_a_store_that_would_keep_nothing_is_refused(opened, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KDError, match="the store would keep nothing: name a form"):
        opened(hidden="")
    assert sorted(tmp_path.iterdir()) == before


def test_other_layers_leave_the_store(cuts, store, opened, tree_of, tmp_path):
    store(cuts)
    before = tree_of(tmp_path)
    for other in ("1:half", "out:half,1:half", "1:half,out:mvq:4:ab"):
        with pytest.raises(KDError, match=f"made with hidden '{HIDDEN}'.*'{other}'"):
            opened(hidden=other)
    with pytest.raises(KDError, match="made with ctc '' and this teacher has 'dense'"):
        opened(ctc="dense")
    assert tree_of(tmp_path) == before


# Parts that don't fit


def parts_of(cut_id, logits, **frames):
    """The parts of a cut, some of another number of frames."""
    n = {"ctc": None, "lattice": None, 1: None, OUT: None}
    n.update(
        {OUT if k == "out" else 1 if k == "one" else k: v for k, v in frames.items()}
    )
    hidden = {k: hidden_of(cut_id, n[k])[k] for k in (1, OUT)}
    lattice = lattice_of(cut_id, n["lattice"])
    return {"ctc": logits[: n["ctc"]], "lattice": lattice, "hidden": hidden}


@pytest.mark.parametrize(
    "kept, other",
    [
        ("all", {"ctc": 13}),
        ("all", {"lattice": 13}),
        ("all", {"one": 15}),
        ("all", {"out": 27}),  # at 50 Hz
        ("hidden", {"out": 1}),
        ("lattice-hidden", {"lattice": 15}),
        ("lattice-hidden", {"one": 0}),
        ("ctc-hidden", {"ctc": 12}),
    ],
)
def test_frames_that_differ_between_parts_are_refused(
    cuts, opened, make_logits, kept, other
):
    logits = make_logits(cuts[2])
    with opened(**KEPT[kept]) as writer:
        with pytest.raises(KDError, match="cut c3 comes with .* frames of") as e:
            writer.write(cuts[2], **parts_of("c3", logits, **other))
        numbers = {14, *other.values()}
        assert all(str(n) in str(e.value) for n in numbers)
        assert len(writer) == 0 and writer.bytes_written == 0
        writer.write(cuts[2], **parts_of("c3", logits))
        assert len(writer) == 1


def test_no_frames_are_refused(cuts, opened):
    with opened() as writer, pytest.raises(KDError, match="cut c3 comes with"):
        writer.write(cuts[2], hidden=hidden_of("c3", 0))


@pytest.mark.parametrize(
    "lacking, words",
    [
        ("ctc", "without CTC logits, and the store holds that as dense"),
        ("lattice", "without a lattice, and the store holds that as collapsed"),
        (1, "without layer 1, and the store holds that as 1:half"),
        (OUT, "without layer out, and the store holds that as out:half"),
        ("hidden", "without layer 1, and"),
    ],
)
def test_a_cut_that_lacks_a_part_is_refused(cuts, opened, make_logits, lacking, words):
    given = {
        "ctc": make_logits(cuts[2]),
        "lattice": lattice_of("c3"),
        "hidden": hidden_of("c3"),
    }
    if lacking in given:
        del given[lacking]
    else:
        del given["hidden"][lacking]
    with opened(**KEPT["all"]) as writer:
        with pytest.raises(KDError, match=f"the cut c3 comes {words}"):
            writer.write(cuts[2], **given)
        assert len(writer) == 0 and writer.bytes_written == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_refused(cuts, opened, value):
    rows = hidden_of("c3")
    rows[OUT][3, 0, 2] = value
    with opened() as writer, pytest.raises(KDError, match="out on cut c3 .*not finite"):
        writer.write(cuts[2], hidden=rows)


@pytest.mark.parametrize("change", ["one", "all"])
def test_rows_beyond_float16_are_refused(cuts, opened, change):
    """Of all numbers of a vector alike too, where their spread tells nothing."""
    rows = hidden_of("c3")
    rows[1][3, 0, 2 if change == "one" else slice(None)] = 7e4
    with opened() as writer, pytest.raises(KDError, match="layer 1 on cut c3.*float16"):
        writer.write(cuts[2], hidden=rows)


@pytest.mark.parametrize(
    "layer, shape",
    [(1, (1, 6)), (1, (4, 6)), (1, (6,)), (OUT, (2, 5))],
    ids="one-vector four-vectors no-pairs two-of-output".split(),
)
def test_rows_of_a_wrong_shape_are_refused(cuts, opened, layer, shape):
    """They would be read as other vectors than they were."""
    rows = hidden_of("c3", shapes={**SHAPES, layer: shape})
    with opened() as writer:
        with pytest.raises(KDError, match="c3.*shape"):
            writer.write(cuts[2], hidden=rows)
        assert len(writer) == 0


# Rows and time


OPERATIONS = {
    "as-it-is": (lambda c, noise: c["c3"], [(0, "c3", 0, 14)]),
    "padded": (lambda c, noise: c["c3"].pad(duration=2.0), [(0, "c3", 0, 14)]),
    "left-padded": (
        lambda c, noise: c["c3"].pad(duration=2.0, direction="left"),
        [(35, "c3", 0, 14)],
    ),
    "mixed": (lambda c, noise: c["c3"].mix(noise, snr=10), [(0, "c3", 0, 14)]),
    "late-in-noise": (
        lambda c, noise: noise.mix(c["c3"], snr=10, offset_other_by=0.3),
        [(8, "c3", 0, 14)],
    ),
    "truncated": (
        lambda c, noise: c["c2"].truncate(offset=0.4, duration=0.5),
        [(0, "c2", 10, 21)],
    ),
    "short": (
        lambda c, noise: c["c2"].truncate(offset=0.02, duration=0.1),
        [(0, "c2", 1, 4)],
    ),
    "window": (
        lambda c, noise: list(c["c2"].cut_into_windows(0.24))[1],
        [(0, "c2", 6, 12)],
    ),
    "truncated-padded-mixed": (
        lambda c, noise: c["c2"]
        .truncate(offset=0.4, duration=0.3)
        .pad(duration=0.7, direction="left")
        .mix(noise, snr=10),
        [(10, "c2", 10, 18)],
    ),
    "two-in-a-row": (
        lambda c, noise: c["c3"].append(c["c1"]),
        [(0, "c3", 0, 14), (15, "c1", 0, 7)],
    ),
    "two-with-a-gap": (
        lambda c, noise: c["c1"].pad(duration=1.0).append(c["c2"].truncate(offset=0.4)),
        [(0, "c1", 0, 7), (25, "c2", 10, 21)],
    ),
    "other-rate": (lambda c, noise: c["c3"].resample(16000), [(0, "c3", 0, 14)]),
}


@pytest.fixture
def noise(make_cut):
    cut = make_cut("noise", 150)
    cut.supervisions = []
    return cut


@kept("hidden", "ctc-hidden", "sparse-hidden")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_of_hidden_layers_move_with_time_as_ctc_rows_do(
    cuts, store, noise, kept, operation, stored_form
):
    stored = store(cuts, **kept)
    change, expected = OPERATIONS[operation]
    given = [stored["c1"], change(stored, noise), stored["c4"]]
    targets = collate_targets(given)
    lens = [7, max(at + last - first for at, _, first, last in expected), 1]
    assert targets.lens.tolist() == lens
    spoken = torch.zeros(3, max(lens), dtype=torch.bool)
    spoken[0, :7] = spoken[2, 0] = True
    places = [(0, 0, "c1", 0, 7), (2, 0, "c4", 0, 1)]
    for at, name, first, last in expected:
        spoken[1, at : at + last - first] = True
        places.append((1, at, name, first, last))
    assert torch.equal(targets.mask, spoken)
    assert set(targets.parts["hidden"]) == {1, OUT}
    for layer, shape in SHAPES.items():
        assert targets.parts["hidden"][layer].shape == (3, max(lens), *shape)
    for row, at, name, first, last in places:
        here = slice(at, at + last - first)
        for layer, rows in halved(hidden_of(name)).items():
            found = targets.parts["hidden"][layer][row, here]
            assert torch.equal(found, rows[first:last]), (name, layer)
        ctc = targets.parts.get("ctc")
        if kept.get("ctc") == "dense":
            assert torch.equal(ctc[row, here], stored_form(stored[name])[first:last])
        elif kept.get("ctc"):
            best = stored_form(stored[name])[first:last].argmax(-1)
            assert torch.equal(ctc.indices[row, here, 0], best)
        else:
            assert ctc is None


def test_the_kinds_that_are_named_are_read_by_default_all(cuts, store):
    stored = store(cuts, ctc="dense")
    assert set(collate_targets([stored["c1"]]).parts) == {"ctc", "hidden"}
    for kinds in (["hidden"], ["ctc"], ["hidden", "ctc"], []):
        parts = collate_targets([stored["c1"]], kinds=kinds).parts
        assert list(parts) == kinds
    assert set(collate_targets([stored["c1"]]).parts["hidden"]) == {1, OUT}
    with pytest.raises(KDError, match="no kind of target 'phones'.*ctc, lattice"):
        collate_targets([stored["c1"]], kinds=["phones"])


@kept("hidden", "ctc-hidden")
def test_a_cut_without_targets_has_no_rows_where_told(cuts, store, make_cut, kept):
    stored = store(cuts, **kept)
    bare = make_cut("b1", 61)
    with pytest.raises(KDError, match="cut b1 has no targets"):
        collate_targets([bare, stored["c1"]], kinds=["hidden"])
    targets = collate_targets([bare, stored["c1"]], missing="hard", kinds=["hidden"])
    assert targets.lens.tolist() == [0, 7] and not targets.mask[0].any()
    for layer, rows in halved(hidden_of("c1")).items():
        assert torch.equal(targets.parts["hidden"][layer][1], rows)


def test_time_that_moved_is_refused_without_ctc_targets(cuts, store):
    stored = store(cuts)
    with pytest.raises(KDError, match="speed or tempo"):
        collate_targets([stored["c3"].perturb_speed(0.9)], kinds=["hidden"])
    with pytest.raises(KDError, match="targets overlap at frames 7 to 13"):
        mixed = stored["c3"].mix(stored["c2"], snr=1, offset_other_by=0.28)
        collate_targets([mixed], kinds=["hidden"])


@kept("lattice", "lattice-hidden", "all")
def test_lattices_are_read_with_and_without_other_parts(cuts, store, noise, kept):
    stored = store(cuts, **kept)
    part = stored["c2"].truncate(duration=0.5)
    given = [stored["c1"], part, stored["c3"].mix(noise, snr=10)]
    layers = kept.get("hidden") != ""
    targets = collate_targets(given)
    if not layers:
        with pytest.raises(KDError, match="keeps no hidden layers.*--keep-hidden"):
            collate_targets(given, kinds=["hidden"])
    assert targets.whole.tolist() == [True, False, True]
    assert targets.parts["lattice"][1] is None  # its labels are unknown
    codec = read_fingerprint(Pointer.of_cut(part).store).kinds["lattice"].codec
    for found, name in (
        (targets.parts["lattice"][0], "c1"),
        (targets.parts["lattice"][2], "c3"),
    ):
        expected = codec.decode(codec.encode(lattice_of(name), name), 11)
        assert found.occupancy.shape == (FRAMES[name], 3)
        assert torch.equal(found.occupancy, expected.occupancy)
        assert torch.equal(found.nodes.log_probs, expected.nodes.log_probs)
        assert found.labels.tolist() == [3, 4]
    assert set(targets.parts.get("hidden", {})) == ({1, OUT} if layers else set())
    assert (targets.parts.get("ctc") is None) == (not kept.get("ctc"))


def test_a_store_of_hidden_layers_has_no_lattices(cuts, store):
    stored = store(cuts)
    with pytest.raises(KDError, match="kd keeps no lattices: .*--keep-lattice"):
        collate_targets([stored["c1"]], kinds=["lattice"])


def test_stores_of_other_layers_do_not_mix_in_a_batch(cuts, store):
    a, b = store(cuts[:2], "a"), store(cuts[2:], "b", hidden="1:half")
    both = [a["c1"], b["c3"]]
    with pytest.raises(KDError, match=f"made with hidden '{HIDDEN}'.*'1:half'"):
        collate_targets(both, kinds=["hidden"])
    with pytest.raises(KDError, match="made with hidden"):
        store_fingerprint(both)


# Codes


@kept("hidden", "ctc-hidden")
def test_codes_are_stored_and_moved_as_rows_are(cuts, store, quantizer, tmp_path, kept):
    path = HiddenCodec(1).quantizer_file(tmp_path / "kd")
    save_quantizer(quantizer, path)
    codec = HiddenCodec(1, 4, hash_file(path))
    stored = store(cuts, **{**kept, "hidden": f"{codec},out:half"})
    part = stored["c2"].truncate(offset=0.4, duration=0.5).pad(1.0, direction="left")
    targets = collate_targets([stored["c3"], part], kinds=["hidden"])
    assert targets.lens.tolist() == [14, 13 + 11]
    assert targets.parts["hidden"][1].shape == (2, 24, 2, 4)
    assert targets.parts["hidden"][1].dtype == torch.int64
    for row, here, name, there in (
        (0, slice(0, 14), "c3", slice(0, 14)),
        (1, slice(13, 24), "c2", slice(10, 21)),
    ):
        rows = hidden_of(name)
        with torch.no_grad():
            codes = quantizer.encode(rows[1], as_bytes=False)[there]
        assert torch.equal(targets.parts["hidden"][1][row, here], codes)
        half = halved(rows)[OUT][there]
        assert torch.equal(targets.parts["hidden"][OUT][row, here], half)


def test_a_store_of_codes_without_its_quantizer_takes_no_cut(cuts, opened):
    pytest.importorskip("multi_quantization")
    with opened(hidden="1:mvq:4:ab") as writer:
        with pytest.raises(KDError, match="quantizer .*quantizer.1.pt is missing"):
            writer.write(cuts[2], hidden=hidden_of("c3"))
        assert len(writer) == 0


@pytest.fixture
def codec_of(quantizer, tmp_path):
    """A codec whose quantizer lies in ``tmp_path``."""
    path = HiddenCodec(1).quantizer_file(tmp_path)
    save_quantizer(quantizer, path)
    return HiddenCodec(1, 4, hash_file(path)), path


def refuse_quantizer(codec, path, found):
    with pytest.raises(KDError) as e:
        codec.stored_quantizer(path.parent)
    message = str(e.value)
    assert f"the quantizer {path} is {found} and the store's codes are" in message
    assert codec.quantizer in message and "\n" not in message


def test_a_stored_quantizer_is_that_of_the_codes(codec_of, quantizer):
    codec, path = codec_of
    rows = torch.randn(5, 2, 6)
    with torch.no_grad():
        found = codec.stored_quantizer(path.parent).encode(rows)
        assert torch.equal(found, quantizer.encode(rows))
    assert HiddenCodec(OUT).stored_quantizer(path.parent / "none") is None


def test_a_changed_byte_of_a_quantizer_is_found(codec_of):
    codec, path = codec_of
    data, rng = path.read_bytes(), random.Random(0)
    for at in (0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(30))):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        refuse_quantizer(codec, path, hash_file(path))
    path.write_bytes(data)
    codec.stored_quantizer(path.parent)


@pytest.mark.parametrize("kind", ["other", "wide", "torn", "missing", "folder"])
def test_another_quantizer_or_none_is_refused(codec_of, kind):
    codec, path = codec_of
    package = pytest.importorskip("multi_quantization")
    data = path.read_bytes()
    path.unlink()
    if kind in ("other", "wide"):
        torch.manual_seed(4)
        dim = 6 if kind == "other" else 7
        save_quantizer(package.Quantizer(dim, 256, 4).eval(), path)
    elif kind == "torn":
        path.write_bytes(data[:-9])
    elif kind == "folder":
        path.mkdir()
    found = hash_file(path) if path.is_file() else "missing"
    refuse_quantizer(codec, path, found)


def test_no_cut_is_stored_with_another_quantizer(codec_of, cuts, opened, tmp_path):
    codec, path = codec_of
    (tmp_path / "kd").mkdir()
    target = codec.quantizer_file(tmp_path / "kd")
    target.write_bytes(path.read_bytes()[:-1] + b"?")
    with opened(hidden=str(codec)) as writer:
        with pytest.raises(KDError, match="the quantizer .*kd/quantizer.1.pt is "):
            writer.write(cuts[2], hidden=hidden_of("c3"))
        target.write_bytes(path.read_bytes())  # mended
        writer.write(cuts[2], hidden=hidden_of("c3"))
        assert len(writer) == 1


# Damage


def test_a_changed_byte_of_a_layer_is_found(cuts, store, tmp_path):
    stored = store(cuts)
    path = tmp_path / "kd" / "targets.bin"
    data = bytearray(path.read_bytes())
    pointer = Pointer.of_cut(stored["c3"])
    data[pointer.offset + pointer.sizes["hidden.1"] + 3] ^= 1  # in hidden.out
    path.write_bytes(data)
    with pytest.raises(KDError, match="targets of cut c3 in .* damaged"):
        collate_targets([stored["c3"]], kinds=["hidden"])
    collate_targets([stored["c1"], stored["c2"]], kinds=["hidden"])


@pytest.mark.parametrize(
    "other", ["1:mvq:7:ab,out:half", "1:half,out:mvq:4:ab", "0:half", "1:half,2:half"]
)
def test_records_that_are_not_what_the_fingerprint_says_are_refused(
    cuts, store, tmp_path, other
):
    stored = store(cuts)
    path = tmp_path / "kd" / "fingerprint.json"
    values = {**json.loads(path.read_text()), "hidden": other}
    path.write_text(json.dumps(values))
    read_fingerprint.cache_clear()
    with pytest.raises(
        KDError, match="targets of cut c1 were made under the fingerprint .*dump"
    ):
        collate_targets([stored["c1"], stored["c3"]], kinds=["hidden"])


# Other frame rates, symbols, devices


@pytest.mark.parametrize("with_ctc", [True, False])
@pytest.mark.parametrize(
    "wanted, frames",
    [
        (0.02, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]),
        (0.08, [1, 3, 5, 7]),
        (0.06, [0, 2, 3, 5, 6, 8]),
    ],
)
def test_hidden_layers_take_another_frame_rate(with_ctc, wanted, frames):
    """Each row says which frame it is of."""
    rows = torch.arange(9.0).view(1, 9, 1, 1).expand(2, 9, 2, 3)
    ctc = rows[:, :, 0] if with_ctc else None
    hidden = {1: rows, OUT: rows[:, :, :1].long()}
    parts = {"ctc": ctc, "hidden": hidden}
    targets = Targets(torch.tensor([9, 5]), parts=parts)
    targets.mask[0, 4] = False
    found = resample_frames(targets, 0.04, wanted)
    assert found.parts["hidden"][1].shape == (2, len(frames), 2, 3)
    assert found.parts["hidden"][OUT].dtype == torch.int64
    for rows in found.parts["hidden"].values():
        assert rows[0, :, 0, 0].tolist() == frames
    assert found.mask[0].tolist() == [f != 4 for f in frames]
    assert found.lens.tolist() == [len(frames), int(5 * 0.04 / wanted + 1e-9)]
    if with_ctc:
        assert found.parts["ctc"][1, :, 0].tolist() == frames
    else:
        assert found.parts.get("ctc") is None


@pytest.mark.parametrize("with_ctc", [True, False])
@pytest.mark.parametrize("symbols", [[2, 0, 3, 1], [1, 0, 1, 2]])
def test_hidden_layers_stay_where_symbols_are_mapped(with_ctc, symbols):
    ctc = torch.randn(2, 5, 4).log_softmax(-1) if with_ctc else None
    hidden = {1: torch.randn(2, 5, 2, 3)}
    parts = {"ctc": ctc, "hidden": hidden} if with_ctc else {"hidden": hidden}
    targets = Targets(torch.tensor([5, 3]), parts=parts)
    found = map_tokens(targets, torch.tensor(symbols))
    assert torch.equal(found.parts["hidden"][1], hidden[1])
    assert set(found.parts["hidden"]) == {1}
    assert (found.parts.get("ctc") is None) == (not with_ctc)
    assert torch.equal(found.mask, targets.mask)


def test_targets_without_ctc_go_to_a_device():
    parts = {"hidden": {1: torch.zeros(2, 5, 2, 3)}}
    targets = Targets(torch.tensor([5, 3]), parts=parts)
    assert targets.mask.sum(1).tolist() == [5, 3] and targets.whole.all()
    found = targets.to(torch.device("meta"))
    assert found.parts.get("ctc") is None and found.parts.get("lattice") is None
    for x in (found.lens, found.mask, found.whole, found.parts["hidden"][1]):
        assert x.device.type == "meta"
    assert found.parts["hidden"][1].shape == (2, 5, 2, 3)


# TargetDataset


@kept("hidden", "ctc-hidden")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_gives_each_row_its_cuts_hidden_layers(
    cuts, store, kept, num_workers
):
    stored = store(cuts, **kept)
    loader = DataLoader(
        TargetDataset(K2SpeechRecognitionDataset()),
        sampler=SimpleCutSampler(stored, max_duration=1.6, shuffle=True),
        batch_size=None,
        num_workers=num_workers,
    )
    seen = []
    for batch in loader:
        targets = batch["kd_targets"]
        assert (targets.parts.get("ctc") is None) == (not kept.get("ctc"))
        for i, x in enumerate(batch["inputs"]):
            (cut,) = (
                c
                for c in stored
                if np.array_equal(x[: c.num_frames].numpy(), c.load_features())
            )
            n = int(targets.lens[i])
            assert n == FRAMES[cut.id]
            for layer, rows in halved(hidden_of(cut.id)).items():
                assert torch.equal(targets.parts["hidden"][layer][i, :n], rows)
            seen.append(cut.id)
    assert sorted(seen) == sorted(LENGTHS)


def test_a_dataset_maps_and_resamples_with_hidden_layers(cuts, store, stored_form):
    stored = store(cuts, ctc="dense")
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    dataset = K2SpeechRecognitionDataset()
    dataset = TargetDataset(dataset, frame_shift=0.02, token_ids=order)
    found = dataset[CutSet.from_cuts([stored["c3"]])]["kd_targets"]
    for layer, rows in halved(hidden_of("c3")).items():
        assert torch.equal(
            found.parts["hidden"][layer][0], rows.repeat_interleave(2, 0)
        )
    expected = stored_form(stored["c3"]).repeat_interleave(2, 0)
    assert torch.equal(found.parts["ctc"][0][:, order], expected)


def test_a_dataset_reads_the_kinds_that_are_named(cuts, store):
    stored = store(cuts, ctc="dense")
    for kinds in (["ctc"], ["hidden"], ["ctc", "hidden"]):
        dataset = TargetDataset(K2SpeechRecognitionDataset(), kinds=kinds)
        assert list(dataset[stored]["kd_targets"].parts) == kinds


# Statistics


def printed(capsys, cuts):
    """The table of ``cuts``, by the name of each row."""
    capsys.readouterr()
    print_stats(cuts)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines]
    return {words[0]: words[-1].strip() for words in rows}


def test_statistics_without_ctc_are_bytes_alone(cuts, store, capsys):
    stored = store(cuts)
    assert printed(capsys, stored) == {
        "cuts": "4",
        "frames": "43",
        "bytes a frame, hidden.1": "24.00",  # 2 vectors of 6 numbers of 2 bytes
        "bytes a frame, hidden.out": "10.00",
        "forms": HIDDEN,
    }


def test_statistics_of_lattices_without_ctc(cuts, store, capsys):
    stored = store(cuts, **KEPT["lattice-hidden"])
    size = sum(Pointer.of_cut(c).sizes["lattice"] for c in stored)
    found = printed(capsys, stored)
    assert found["forms"] == f"top:3, {HIDDEN}" and found["frames"] == "43"
    assert found["bytes a frame, lattice"] == f"{size / 43:.2f}"
    assert not [name for name in found if "ctc" in name]


@kept("ctc-hidden", "hidden")
def test_statistics_count_the_frames_that_cuts_have_kept(cuts, store, capsys, kept):
    stored = store(cuts, **kept)
    part = stored["c2"].truncate(offset=0.4, duration=0.2)
    found = printed(capsys, [part, stored["c1"]])
    assert (found["cuts"], found["frames"]) == ("2", "12")
    assert found["bytes a frame, hidden.1"] == "24.00"
