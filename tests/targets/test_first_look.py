"""The first look at training cuts: all of them, or the first of those without end."""

from itertools import count

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.targets import first_look
from icefall_kd.targets.dataset import store_fingerprint
from icefall_kd.targets.first_look import FirstLook, is_endless
from icefall_kd.targets.store import FIELD


@pytest.fixture
def lazy(make_cut, make_store, tmp_path):
    """A manifest of three cuts with targets, opened lazily."""
    make_store([make_cut(i, 33) for i in ("c1", "c2", "ç3")], name="one")
    return CutSet.from_jsonl_lazy(tmp_path / "one.jsonl.gz")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(first_look, "SAMPLE", 7)


def is_long(cut):
    return cut.duration > 0


def same(cut):
    return cut


def bare(cuts):
    return CutSet.from_cuts(cut.drop_custom(FIELD) for cut in cuts)


def noise(cuts):
    return bare(cuts).drop_supervisions()


ENDLESS = {
    "repeat": lambda a: a.repeat(),
    "mux": lambda a: CutSet.mux(a.repeat(), a.repeat(), weights=[1, 2]),
    "mux with one end": lambda a: CutSet.mux(a, a.repeat()),
    "mux that stops early": lambda a: CutSet.mux(
        a.repeat(), a.repeat(), stop_early=True
    ),
    "infinite mux": lambda a: CutSet.infinite_mux(a, a),
    "filter": lambda a: CutSet.mux(a.repeat(), a.repeat()).filter(is_long),
    "map": lambda a: a.repeat().map(same),
    "shuffle": lambda a: a.repeat().shuffle(buffer_size=2),
    "chain": lambda a: a + a.repeat(),
    "eager": lambda a: a.to_eager().repeat(),
    "noise": lambda a: a.repeat().mix(noise(a), seed=0),
}
ENDING = {
    "manifest": lambda a: a,
    "list": list,
    "generator": iter,
    "eager": lambda a: a.to_eager(),
    "repeat": lambda a: a.repeat(times=1),
    "mux": lambda a: CutSet.mux(a.filter(is_long), CutSet.from_cuts([])),
    "noise without end": lambda a: a.mix(noise(a).repeat(), seed=0),
    "filter": lambda a: a.filter(is_long).shuffle(buffer_size=2).map(same),
}


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS)
def test_of_cuts_without_end_the_first_are_looked_at(lazy, few, make):
    cuts = make(lazy)
    assert is_endless(cuts)
    found = FirstLook(cuts)
    assert len(list(found)) == 7
    assert found.total == 0  # how many there are is not known
    assert store_fingerprint(cuts)[0].vocab_size == 11


@pytest.mark.parametrize("make", ENDING.values(), ids=ENDING)
def test_all_other_cuts_are_counted(lazy, monkeypatch, make):
    monkeypatch.setattr(first_look, "SAMPLE", 1)
    cuts = make(lazy)
    assert not is_endless(cuts)
    assert FirstLook(cuts).all() == 3


def test_a_mux_that_stops_with_its_first_end_is_read_to_that(lazy):
    cuts = CutSet.mux(lazy.repeat(), lazy, stop_early=True)
    assert not is_endless(cuts)
    assert FirstLook(cuts).all() >= 3


def test_cuts_without_end_that_lack_targets_are_refused(lazy, few):
    with pytest.raises(KDError, match="of 7 training cuts have no targets"):
        store_fingerprint(CutSet.mux(lazy.repeat(), bare(lazy).repeat()))


def test_a_shar_among_other_cuts_ends_the_look(lazy, few):
    """Wherever its first cut beyond the sample stands."""

    def cuts():
        for i in count():
            cut = lazy[i % 3].with_id(f"c{i}")
            if i == 9:
                cut.custom = {**cut.custom, "shard_origin": "x"}
            yield cut

    lazy = lazy.to_eager()
    assert len(list(FirstLook(cuts()))) == 9


def test_the_line_is_one_processs(lazy, capsys, monkeypatch):
    monkeypatch.setattr(first_look, "tqdm", soon(first_look.tqdm))
    FirstLook(lazy).all()
    assert "Looking at the training cuts: 3 cuts" in capsys.readouterr().err
    FirstLook(lazy, silent=True).all()
    assert capsys.readouterr().err == ""


def soon(tqdm):
    """A bar that does not wait before it is shown."""

    def make(**options):
        return tqdm(**{**options, "delay": 0, "mininterval": 0})

    return make


def test_few_cuts_have_no_line(lazy, capsys):
    FirstLook(lazy).all()
    assert capsys.readouterr().err == ""
