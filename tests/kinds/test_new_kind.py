"""A new kind of target: one class and one registration, and nothing else knows it."""

import json

import numpy as np
import pytest
import torch
from lhotse import load_manifest
from lhotse.dataset import K2SpeechRecognitionDataset

from icefall_kd.errors import KDError
from icefall_kd.kinds import KINDS, FrameKind, UtteranceKind, register_kind
from icefall_kd.targets import Fingerprint, TargetDataset, TargetWriter
from icefall_kd.targets.dataset import map_tokens, resample_frames
from icefall_kd.targets.fingerprint import FILENAME
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import read_fingerprint
from icefall_kd.types import EncoderOut

LENGTHS = {"c1": 61, "c2": 88, "c3": 35}  # feature frames
FRAMES = {"c1": 14, "c2": 20, "c3": 7}


class EnergyKind(FrameKind):
    """The length of the encoder's output vector at each frame, in float32."""

    name = "energy"
    title = "energies"

    def take(self, out):
        lens = out.encoder_out_lens.tolist()
        return [x[:n].norm(dim=-1).cpu() for x, n in zip(out.encoder_out, lens)]

    def check(self, value, cut_id):
        super().check(value, cut_id)
        if value.ndim != 1:
            raise KDError(f"the energies of cut {cut_id} are {value.ndim}-dimensional")

    def frames(self, value):
        return [len(value)]

    def encode(self, value, cut_id):
        return {self.name: value.numpy().astype(np.float32).tobytes()}

    def decode(self, records, frames):
        data = b"".join(record[self.name] for record in records)
        values = torch.from_numpy(np.frombuffer(data, np.float32).copy())
        if len(values) != sum(frames):
            raise ValueError(f"{len(values)} energies, and not {sum(frames)}")
        return values


class SpeakerKind(UtteranceKind):
    """One vector for a whole utterance."""

    name = "speaker"
    title = "speakers' vectors"

    def take(self, out):
        return list(out.encoder_out.mean(1).cpu())

    def frames(self, value):
        return []

    def encode(self, value, cut_id):
        return {self.name: value.numpy().tobytes()}

    def decode(self, record):
        return torch.from_numpy(np.frombuffer(record[self.name], np.float32).copy())


@pytest.fixture
def registered():
    register_kind(EnergyKind)
    register_kind(SpeakerKind)
    yield
    for name in FORMS:
        KINDS.pop(name, None)


def output_of(cut_id):
    g = torch.Generator().manual_seed(sum(cut_id.encode()))
    x = torch.randn(1, FRAMES[cut_id] + 2, 5, generator=g)  # two frames of padding
    return EncoderOut(x, torch.tensor([FRAMES[cut_id]]))


def energies(cut_id):
    return output_of(cut_id).encoder_out[0, : FRAMES[cut_id]].norm(dim=-1)


FORMS = {"energy": "float", "speaker": "float"}


@pytest.fixture
def opened(registered, tmp_path, make_fingerprint):
    def open_writer(**changes):
        fingerprint = make_fingerprint(ctc="", further_kinds=FORMS, **changes)
        return TargetWriter(tmp_path / "kd.jsonl.gz", tmp_path / "kd", fingerprint)

    return open_writer


@pytest.fixture
def cuts(opened, make_cut, tmp_path):
    """Cuts with targets of the new kinds, dumped as a teacher's output gives them."""
    with opened() as writer:
        for name, n in LENGTHS.items():
            values = {
                kind: writer.fingerprint.kinds[kind].take(output_of(name))[0]
                for kind in FORMS
            }
            writer.write(make_cut(name, n), **values)
    return load_manifest(tmp_path / "kd.jsonl.gz").to_eager()


def test_a_new_kind_is_dumped_and_read(cuts):
    batch = TargetDataset(K2SpeechRecognitionDataset())[cuts]
    targets, order = batch["kd_targets"], ("c2", "c1", "c3")
    assert set(targets.parts) == {"energy", "speaker"}
    assert targets.parts["energy"].shape == (3, 20)
    for row, name in enumerate(order):
        n = int(targets.lens[row])
        assert n == FRAMES[name]
        assert torch.equal(targets.parts["energy"][row, :n], energies(name))
        speaker = output_of(name).encoder_out[0].mean(0)
        assert torch.equal(targets.parts["speaker"][row], speaker)


def test_it_follows_truncation_padding_and_mixing(cuts, make_cut):
    parts = [
        cuts["c1"].truncate(offset=0.2, duration=0.2),
        cuts["c3"].pad(duration=1.0),
        cuts["c3"].append(cuts["c1"]),
    ]
    targets = collate_targets(parts)
    energy, speaker = targets.parts["energy"], targets.parts["speaker"]
    assert torch.equal(energy[0, :5], energies("c1")[5:10])
    assert torch.equal(energy[1, :7], energies("c3"))
    begin = int(targets.lens[2]) - 14
    assert torch.equal(energy[2, :7], energies("c3"))
    assert torch.equal(energy[2, begin:], energies("c1"))
    assert targets.mask.sum(1).tolist() == [5, 7, 21]
    assert [x is not None for x in speaker] == [False, True, False]
    assert targets.whole.tolist() == [False, True, False]


def test_it_is_resampled_mapped_tiled_and_moved(cuts):
    targets = collate_targets(list(cuts))
    slower = resample_frames(targets, 0.04, 0.08)
    assert set(slower.parts) == {"energy"}  # an utterance's vector has no frames
    assert torch.equal(slower.parts["energy"][0, :7], energies("c1")[1::2])
    mapped = map_tokens(targets, torch.arange(11).flip(0))
    assert torch.equal(mapped.parts["energy"], targets.parts["energy"])
    twice = targets.tile(2)
    assert twice.parts["energy"].shape == (6, 20)
    assert len(twice.parts["speaker"]) == 6
    moved = targets.to(torch.device("meta"))
    assert moved.parts["energy"].device.type == "meta"
    assert moved.parts["speaker"][0].device.type == "meta"


def test_what_does_not_fit_is_refused(
    opened, cuts, make_cut, make_fingerprint, tmp_path
):
    cut = make_cut("c4", 61)
    energy, speaker = torch.zeros(14), torch.zeros(5)
    with opened() as writer:
        with pytest.raises(KDError, match="cut c4 comes without energies"):
            writer.write(cut, speaker=speaker)
        with pytest.raises(KDError, match="2-dimensional"):
            writer.write(cut, energy=torch.zeros(14, 2), speaker=speaker)
        writer.write(cut, energy=energy, speaker=speaker)
    with pytest.raises(KDError, match="keeps no CTC targets: dump with --keep dense"):
        collate_targets(list(cuts), kinds=["ctc"])
    other = make_fingerprint(ctc="", further_kinds={**FORMS, "energy": "half"})
    with pytest.raises(KDError, match="made with energy 'float' and .* has 'half'"):
        TargetWriter(tmp_path / "kd.jsonl.gz", tmp_path / "kd", other)


def test_bytes_that_no_encoder_made_are_refused(cuts, monkeypatch):
    monkeypatch.setattr(EnergyKind, "name", "speaker")  # whose bytes are too few
    with pytest.raises(KDError, match="of cuts c1 to c3 can't be read .*ValueError"):
        collate_targets(list(cuts), kinds=["energy"])


def test_a_kind_that_is_not_registered_is_refused(
    cuts, tmp_path, make_fingerprint, monkeypatch
):
    monkeypatch.delitem(KINDS, "energy")
    read_fingerprint.cache_clear()  # as in a process of its own
    fingerprint = make_fingerprint(ctc="", further_kinds=FORMS)
    for use in (
        lambda: collate_targets(list(cuts)),
        lambda: TargetWriter(tmp_path / "a.jsonl", tmp_path / "a", fingerprint),
    ):
        with pytest.raises(KDError, match="kind of target 'energy'.*register") as e:
            use()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "a").exists()


def test_a_stores_fingerprint_names_further_kinds(cuts, tmp_path, make_fingerprint):
    values = json.loads((tmp_path / "kd" / FILENAME).read_text())
    assert values["further_kinds"] == FORMS and values["ctc"] == ""
    assert Fingerprint.read(tmp_path / "kd").forms == FORMS
    with_ctc = make_fingerprint(further_kinds=FORMS)
    assert list(with_ctc.forms) == ["ctc", "energy", "speaker"]
    assert with_ctc.digest != make_fingerprint().digest
