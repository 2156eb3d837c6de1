"""Settings of a student that is distilled, and cuts with what its teacher said."""

import pytest
import torch
from lhotse import CutSet

from icefall_kd.tap import ModelTap
from icefall_kd.targets import TargetWriter
from icefall_kd.tokens import load_tokenizer
from icefall_kd.training.options import all_options


@pytest.fixture
def sp(bpe_models):
    return load_tokenizer(bpe_models.a)


@pytest.fixture
def cuts(request, make_cut):
    """Cuts with the ``TEXTS`` and of the ``LENGTHS`` that the test's file has."""
    texts, lengths = request.module.TEXTS, request.module.LENGTHS
    return CutSet.from_cuts(make_cut(i, n, text=texts[i]) for i, n in lengths.items())


@pytest.fixture
def make_params(make_settings):
    defaults = {option.dest: option.default for option in all_options()}

    def make(ctc=0.7, hard=0.3, temperature=2.0, **changes):
        kd = {
            "kd_config": "",
            "kd_ctc_weight": ctc,
            "kd_hard_weight": hard,
            "kd_temperature": temperature,
            "enable_spec_aug": False,
            "spec_aug_time_warp_factor": 80,
        }
        return make_settings(**{**defaults, **kd, **changes})

    return make


@pytest.fixture
def online(make_params, teacher_exp):
    """Params of a student of the teacher in ``teacher_exp``, taught online."""

    def make(**changes):
        settings = {
            "vocab_size": 25,
            "kd_teacher_exp_dir": str(teacher_exp.folder),
            "kd_teacher_epoch": 2,
            "kd_teacher_recipe": str(teacher_exp.recipe),
            "kd_teacher_use_averaged_model": False,
        }
        return make_params(**{**settings, **changes})

    return make


@pytest.fixture
def with_lattices(make_model, make_cut, make_fingerprint, tmp_path):
    """Cuts with a teacher's lattices and no CTC targets."""

    def make(lattice):
        fingerprint = make_fingerprint(ctc="", lattice=lattice, s_range=3)
        cuts = [make_cut(name, n) for name, n in zip("abc", (61, 47, 33))]
        manifest = tmp_path / "kd.jsonl.gz"
        with TargetWriter(manifest, tmp_path / "kd", fingerprint) as writer:
            with ModelTap(make_model(seed=5)) as hook:
                for cut, y in zip(cuts, ([3, 4, 3], [5, 6], [7])):
                    x = torch.from_numpy(cut.load_features())[None]
                    out = hook.encode(x, torch.tensor([x.size(1)]))
                    writer.write(cut, lattice=hook.lattice(out, [y], 3))
        return CutSet.from_file(manifest).to_eager()

    return make
