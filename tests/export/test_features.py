"""How a recipe's features were made is found out, or the export is refused."""

import pytest
from lhotse import CutSet

from icefall_kd.errors import KDError
from icefall_kd.export.features import FeatureSettings, features_of


@pytest.fixture
def manifest(tmp_path):
    def write(*cuts):
        CutSet.from_cuts(cuts).to_file(tmp_path / "some.jsonl")
        return str(tmp_path / "some.jsonl")

    return write


@pytest.mark.parametrize("mean", ["none", "utterance"])
def test_whose_mean_was_taken_off_is_found_out(manifest, speak, mean):
    path = manifest(speak("a", 43, mean), speak("b", 61, mean))
    found = features_of(path, 20, False)
    assert found == FeatureSettings(8000, 20, mean)
    assert FeatureSettings.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(
    "options",
    [{"high_freq": 0.0}, {"low_freq": 300.0}, {"preemph_coeff": 0.0}],
    ids=lambda options: next(iter(options)),
)
def test_features_that_no_reader_could_compute_are_refused(manifest, speak, options):
    path = manifest(speak("a", 43, **options))
    with pytest.raises(KDError, match="the stored features of the cut a are not the"):
        features_of(path, 20, False)


def test_cuts_of_two_ways_are_refused(manifest, speak):
    path = manifest(speak("a", 43), speak("b", 61, "utterance"))
    with pytest.raises(KDError, match="cuts a and b of .* made in two ways"):
        features_of(path, 20, False)


def test_another_number_of_features_is_refused(manifest, speak):
    with pytest.raises(KDError, match="has 20 features a frame and the model takes 40"):
        features_of(manifest(speak("a", 43)), 40, False)


def test_cuts_without_audio_are_refused(manifest, make_cut):
    with pytest.raises(KDError, match="of the cut a can't be read"):
        features_of(manifest(make_cut("a", 43)), 20, False)


def test_features_on_the_fly_need_no_stored_ones(manifest, speak):
    cut = speak("a", 43)
    cut.features = None
    path = manifest(cut)
    assert features_of(path, 20, True) == FeatureSettings(8000, 20, "none")
    with pytest.raises(KDError, match="no cut of one channel with stored features"):
        features_of(path, 20, False)


def test_settings_that_are_none_are_refused():
    with pytest.raises(KDError, match="features that can't be read"):
        FeatureSettings.from_dict({"sampling_rate": 8000, "bins": 20})
