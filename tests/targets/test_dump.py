"""dump_targets: a teacher over cuts into a writer."""

import numpy as np
import pytest
import torch
from lhotse import load_manifest

from icefall_kd.errors import KDError
from icefall_kd.kinds import KINDS, FrameKind, register_kind
from icefall_kd.targets import TargetWriter, batches
from icefall_kd.targets.dump import dump_targets
from icefall_kd.targets.model_input import collate_input
from icefall_kd.targets.reading import collate_targets
from icefall_kd.teacher.teacher import Teacher

LENGTHS = {"c1": 61, "c2": 33, "c3": 90, "c4": 47, "c5": 12}


@pytest.fixture
def cuts(make_cut):
    return [make_cut(name, n) for name, n in LENGTHS.items()]


@pytest.fixture
def dumped(tmp_path, make_fingerprint, make_model, monkeypatch):
    """Dump cuts; the manifest with their targets, and the model."""
    monkeypatch.setattr(batches, "STRETCH", 1.0)  # of two cuts or one
    model = make_model()

    def dump(cuts, name="kd", job=0, num_jobs=1, forms=(), **options):
        fingerprint = make_fingerprint(**dict(forms))
        teacher = Teacher([model], with_ctc=bool(fingerprint.ctc))
        manifest = tmp_path / f"{name}.jsonl.gz"
        with TargetWriter(
            manifest, tmp_path / name, fingerprint, job=job, num_jobs=num_jobs
        ) as writer:
            dump_targets(cuts, teacher, writer, num_workers=0, **options)
        teacher.close()
        return load_manifest(writer.manifest), model

    return dump


def test_each_cut_gets_what_the_teacher_computes_on_it_in_the_manifests_order(
    cuts, dumped
):
    manifest, model = dumped(cuts)
    assert [cut.id for cut in manifest] == list(LENGTHS)
    teacher = Teacher([model])
    for cut in manifest:
        stored = collate_targets([cut]).parts["ctc"][0]
        expected = teacher.targets(*collate_input([cut])).parts["ctc"][0]
        torch.testing.assert_close(stored, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("max_duration", [0.01, 100.0])
def test_cuts_beyond_the_bounds_go_without_targets(cuts, dumped, max_duration):
    options = {"cut_seconds": (0.3, 0.7), "max_duration": max_duration}
    manifest, _ = dumped(cuts, **options)
    with_targets = [cut.id for cut in manifest if cut.custom["kd_targets"]]
    assert with_targets == ["c1", "c2", "c4"]
    assert [cut.id for cut in manifest] == list(LENGTHS)


def test_jobs_share_the_stretches(cuts, dumped):
    ids = [[c.id for c in dumped(cuts, job=j, num_jobs=2)[0]] for j in range(2)]
    assert sorted(ids[0] + ids[1]) == sorted(LENGTHS) and all(ids)


def test_wider_bounds_do_not_go_on_with_a_store_of_narrower_ones(
    cuts, tmp_path, make_fingerprint, make_model
):
    teacher = Teacher([make_model()])
    places = (tmp_path / "kd.jsonl.gz", tmp_path / "kd", make_fingerprint())
    with pytest.raises(RuntimeError, match="cut short"):
        with TargetWriter(*places) as writer:
            narrow = {"cut_seconds": (0.3, 0.7), "num_workers": 0}
            dump_targets(cuts, teacher, writer, **narrow)
            raise RuntimeError("cut short")
    with pytest.raises(KDError, match="cut c3 of 0.9 s .* another `cut_seconds`"):
        with TargetWriter(*places) as writer:
            dump_targets(cuts, teacher, writer, num_workers=0)


class Energy(FrameKind):
    """The mean square of the encoder's output, (T,), in float32."""

    name = "energy"
    title = "energies"

    def take(self, out):
        energies = out.encoder_out.square().mean(-1).cpu()
        return [x[:n] for x, n in zip(energies, out.encoder_out_lens.tolist())]

    def frames(self, value):
        return [len(value)]

    def encode(self, value, cut_id):
        return {self.name: value.numpy().astype("<f4").tobytes()}

    def decode(self, records, frames):
        data = b"".join(record[self.name] for record in records)
        return torch.from_numpy(np.frombuffer(data, "<f4").copy())


def test_a_new_kind_of_target_is_dumped_and_read(cuts, dumped, monkeypatch):
    monkeypatch.setitem(KINDS, "energy", None)
    register_kind(Energy)
    manifest, model = dumped(cuts, forms={"further_kinds": {"energy": "mean"}})
    teacher = Teacher([model])
    for cut in manifest:
        targets = collate_targets([cut], kinds=["energy"])
        (out,) = teacher.run(*collate_input([cut]))
        expected = out.encoder_out.square().mean(-1)
        torch.testing.assert_close(targets.parts["energy"], expected)
