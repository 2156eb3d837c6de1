"""Seconds of test sets, and bytes of targets."""

import shutil

import pytest

from icefall_kd.report.manifests import manifests_of, measure_targets


@pytest.mark.parametrize(
    "name, test_set",
    [
        ("librispeech_cuts_test-clean.jsonl.gz", "test-clean"),
        ("cuts_TEST_NET.jsonl.gz", "test-net"),
        ("aishell_cuts_test.jsonl.gz", "test"),
    ],
)
def test_a_sets_manifest_is_found_by_the_end_of_its_name(tmp_path, name, test_set):
    for other in (name, "librispeech_cuts_dev-clean.jsonl.gz", "cuts_my-test.jsonl.gz"):
        (tmp_path / other).touch()
    assert [p.name for p in manifests_of(tmp_path, test_set)] == [name]


def test_all_manifests_of_a_set_are_found(tmp_path):
    for name in ("b_cuts_test.jsonl.gz", "a_cuts_test.jsonl.gz"):
        (tmp_path / name).touch()
    found = [p.name for p in manifests_of(tmp_path, "test")]
    assert found == ["a_cuts_test.jsonl.gz", "b_cuts_test.jsonl.gz"]


def test_targets_are_added_up(make_cut, make_store):
    cuts = make_store([make_cut("a", 100), make_cut("b", 150)], ctc="top:4")
    pointers = [cut.kd_targets for cut in cuts]
    found = measure_targets([*cuts, make_cut("c", 50)])
    assert (found.all_cuts, found.cuts) == (3, 2)
    assert found.bytes == sum(sum(p["sizes"].values()) for p in pointers) > 0
    assert found.seconds == pytest.approx(2.5)
    assert found.forms == ["ctc top:4"] and found.missing == []


def test_both_cuts_of_a_mixed_one_count(make_cut, make_store):
    a, b = make_store([make_cut("a", 100), make_cut("b", 150)])
    assert measure_targets([a.append(b)]).bytes == measure_targets([a, b]).bytes


def test_a_store_that_is_gone_is_named_and_its_bytes_are_known(
    make_cut, make_store, tmp_path
):
    cuts = make_store([make_cut("a", 100)], name="gone")
    shutil.rmtree(tmp_path / "gone")
    found = measure_targets(cuts)
    assert found.bytes > 0 and found.forms == []
    assert found.missing == [str(tmp_path / "gone")]


def test_cuts_without_targets_have_no_bytes(make_cut):
    found = measure_targets([make_cut("a", 100)])
    assert (found.all_cuts, found.cuts, found.bytes) == (1, 0, 0)
