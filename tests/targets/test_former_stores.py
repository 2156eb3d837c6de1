"""Stores of the code before kinds of targets became classes: read, and made again."""

import json
import zlib
from base64 import b64decode

import pytest
import torch
from lhotse import CutSet, MonoCut
from lhotse.serialization import load_jsonl

from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint, TargetWriter
from icefall_kd.targets.fingerprint import FILENAME
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer
from icefall_kd.types import NoPath, PrunedLattice

# Four stores: manifest, fingerprint and records, the last in base 64; deflated.
STORES = """
eNrtWG1zokgQ/itbfs1eAgPCkKqtusEXNBGjJGLgvEoNr6K8GEA0bOW/7/Biom5yl9ury17tLl+A7p7utp+h
H3s+Nyw7TOzG+YfPjaV1ukii0Ccvjc+zhmfNyNOsYVKzxkdyT1Icp4WIOqWKd2sd49SLwkoE+EJmznEY2n4p
KtesV3aceQkxSwrhH38W0vRhZVe+5SiMWuu0CmCukzQKCgWJvrTuSDzXTpNaQHRxvWppVQscz68ltemp4YWV
KnKcxE6f8/Bye+fITM3iiSkVPk5Tzyy9sFwhmHsWqcgpXUgAuyeJ1qU7Gj6WucYmA0obSDE0wwkMqH5Celg0
J8ZBFZl5aw2TaB1XGdVGjhe6dryKvbB2bjdZg6N4yIMmYCwMZ43Hx8dZuI8Z/SbMgHBwwf8phDQNXwERUMeY
0dwLmIFDzGiWF5oCBWnmEDP6GDPwjTX8ZghJfFKasz3z8pOsvsjwQ1EmG5tzO6684H95kd9be42WdgXvrPEk
zCITG3dF1QtFs5YaPg6Xd9VGo2pZsjYSHKx8kvadg00Cc/lB1dqynnfJ3HN2ZdxpnhaRipZBIEXtfIbr4M6x
cbqOayx2ilp497wFl9i3vN8cgyT2lPzOaj8sXevqzTOret/Tkr1eQGwi38erxLae1AnJksBS7YtKVG2zagF9
Pse+85FsufLhuYp2nNS7hZmFzxjv7fcCXse0Jxt4lTomnmzUqZDJZn/bvaIzWVczI++1ZOUmNXLJvtgu9EB0
NaR4F66maZLuesMkVm87Q4RsDUUUOuvfJxNeVbNxG/qyfLlFcReNNpfbMUL6chgoGwQTapxfIxEl1LS4txLK
GBIHL+t7TM+XR+34lpF8WbqMe6HkQWn60Au7+iIfKh2xL1PtoWIW98FQCTSYTxR03R6ifHKLrtGnTw3yCZJt
tvoJmQYIR0zDUUccwgk8BDxPvR+F0KYABR4ADmCGgab5o1MIFF4Dhz0Cp8kekYXAszQHGab53cjiFbB+kcW7
kgVpXufgd/AyXaxwOj8vLOiX+IJ6gS/+KUEUjV8LLi4X0XapBeK8aPzo6moAbpOQb1Iyal3n4lhhQ2kYaJLo
ilKfWM1dPVuchZtOH41PYhHppV6XBg9mqEc6EF1CJh5CXakv6XPtasTBJZN6J3MatUcn4tQq7L3rTA+qmIR4
Yk9zbmQHiWIT5UKpf4rnlvFGcATPELJ4tKniadnFtRrobpGz5raUvpxLAr5tKpk8RGLkiV2qIghs4VXqZT/j
PAK4Y5Y4njRYgeWaDE+946TBMQ5mWIsTSGzTpH94mhDYV9CpJpC/4HAGcoJAQ4rjvxtNvALWL5p4V5rYtbDz
U+GceZks9k3AW+eLb+GLos+rftm7Aw21F4PcxkY+biMRi2LH/5orglYfPKSqOaaQ2HRbi1vP1IDiaUEXqKHu
qtM+QoHm6u7NzUBCWOk14+y+BxT1hny6o0iYaujmhO2pYbHuhrICnXBDm4Uu8ZePW07pj4wtEupoRNOSxGB5
GXB4rCGx44pxuY6syeq8iV6TLlxE8pQlY3GSDMDK8SW4odDA17ortx4sStBt62ekDeaoMfHc0f9XDlAQQgDo
96MNk3Oww9MGNDjSygDzw9OG8Gba+Gq6gEKTTH8V8XwX2ngFrF+08a60UXewc/Zlyjg8qfoPRgtduiANGSFt
qm30oEta/pi8tXMkrv6eJrT7xDbxYKMbfdtUD86rfPmKr8+NtAcUd6cxELabuIONyeVWvRcy07zcSgFd5aC4
RbsnseZojNBwjIbV2PN03tXXJDy+N1Yr0UWdayStD87NbvfPqboHeagGgNvNojPhp3Bb0sbjF/VWtH0=
"""


def stores():
    values = json.loads(zlib.decompress(b64decode(STORES)))
    for files in values.values():
        files["kd/targets.bin"] = b64decode(files["kd/targets.bin"])
        for name in ("kd.jsonl", "kd/fingerprint.json"):
            files[name] = files[name].encode()
    return values


def numbers(*shape, seed):
    """The same on every machine, without a generator."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((i * 37 + seed * 11) % 101 / 10).float().reshape(shape)


def lattice_of(t, seed):
    occupancy = (numbers(1, t, 2, seed=seed) / 10).clamp(0, 1)
    return PrunedLattice(
        torch.arange(2).expand(1, t, 2),
        torch.tensor([[0, 0, 1, t]]),
        torch.tensor([[3]]),
        numbers(1, t, 2, 5, seed=seed + 1),
        occupancy,
    )


@pytest.fixture(params=["dense", "top", "adaptive", "sampled"])
def former(request, tmp_path, monkeypatch):
    """The files of a former store, in the working folder."""
    monkeypatch.chdir(tmp_path)
    files = stores()[request.param]
    (tmp_path / "kd").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return request.param, files


def test_the_same_targets_make_the_same_files_as_before(former, tmp_path):
    name, files = former
    fingerprint = Fingerprint.read("kd")
    (tmp_path / "new").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "new")
        with TargetWriter("kd.jsonl", "kd", fingerprint) as writer:
            for k, t in enumerate([3, 2]):
                cut = MonoCut(f"c{k}", 0.0, 0.15 + 0.04 * t, channel=0)
                none = k == 1 and name == "dense"
                writer.write(
                    cut,
                    numbers(t, 5, seed=k),
                    lattice=NoPath(t) if none else lattice_of(t, k),
                    hidden={
                        1: numbers(t, 2, 2, seed=k),
                        "out": numbers(t, 1, 3, seed=k),
                    },
                )
    for path, data in files.items():
        assert (tmp_path / "new" / path).read_bytes() == data, path


def cuts_of(folder):
    """The cuts of the manifest, whose store is not relative to the working folder."""
    cuts = list(CutSet.from_dicts(load_jsonl(folder / "kd.jsonl")))
    for cut in cuts:
        cut.custom[FIELD]["store"] = str(folder / "kd")
    return cuts


def test_a_former_store_is_read(former, tmp_path):
    name, _ = former
    cuts = cuts_of(tmp_path)
    targets = collate_targets(cuts)
    fingerprint = Fingerprint.read("kd")
    assert list(targets.parts) == list(fingerprint.forms)
    assert targets.lens.tolist() == [3, 2] and targets.whole.all()
    assert all(Pointer.of_cut(cut).fingerprint == fingerprint.digest for cut in cuts)
    first, second = targets.parts["lattice"]
    assert first.labels.tolist() == [3] and (second is None) == (name == "dense")
    ctc = targets.parts["ctc"]
    if name != "dense":
        assert ctc.indices.shape[:2] == (2, 3)
        return
    expected = numbers(3, 5, seed=0).log_softmax(-1)
    torch.testing.assert_close(ctc[0], expected, rtol=2**-10, atol=2**-8)
    rows = targets.parts["hidden"][1][1, :2]
    torch.testing.assert_close(rows, numbers(2, 2, 2, seed=1), rtol=2**-10, atol=0)


@pytest.mark.parametrize("version", [2, 4])
def test_a_store_of_another_version_is_refused_with_the_remedy(
    former, tmp_path, version
):
    path = tmp_path / "kd" / FILENAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    cuts = cuts_of(tmp_path)
    words = f"is of version {version} .* reads version 3: .*icefall-kd dump --overwrite"
    for read in (lambda: Fingerprint.read("kd"), lambda: collate_targets(cuts)):
        with pytest.raises(KDError, match=words) as e:
            read()
        assert "\n" not in str(e.value)
