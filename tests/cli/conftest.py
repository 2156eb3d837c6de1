"""The commands, run in this process, and small manifests for them."""

import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from exporting import speak  # noqa: F401
from lhotse import CutSet
from report_folders import KD, write_exp

from icefall_kd import ModelTap
from icefall_kd.cli import cli
from icefall_kd.teacher import loader
from icefall_kd.teacher.loader import load_recipe_model

LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 33}


@pytest.fixture
def invoke(capsys):
    """Run ``icefall-kd WORD ...``: its status, and the lines of both streams."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli([str(w) for w in words], prog_name="icefall-kd")
        out, err = capsys.readouterr()
        return SimpleNamespace(code=e.value.code, out=out, err=err.splitlines())

    return run


@pytest.fixture
def refused(invoke, tmp_path, tree_of):
    """The command ends with status 1 and one sentence, and writes nothing.

    Before it there may be a line of what the command began to do.
    """

    def run(*words):
        before = tree_of(tmp_path)
        done = invoke(*words)
        assert done.code == 1, done
        errors = [x for x in done.err if x.startswith("icefall_kd: error: ")]
        assert errors == done.err[-1:] and len(done.err) <= 2, done.err
        assert done.out == ""
        assert tree_of(tmp_path) == before
        return done.err[-1]

    return run


@pytest.fixture
def in_cuts(make_cut, tmp_path):
    path = tmp_path / "in.jsonl.gz"
    CutSet.from_cuts(make_cut(i, n) for i, n in LENGTHS.items()).to_file(path)
    return path


@pytest.fixture
def teacher_words(teacher_exp):
    return [
        *("--recipe", teacher_exp.recipe),
        *("--exp-dir", teacher_exp.folder),
        *("--epoch", 2),
        *("--use-averaged-model", 0),
    ]


@pytest.fixture
def dump_words(in_cuts, tmp_path, teacher_words, monkeypatch):
    """``dump`` of each cut by itself; a word given twice counts the second time."""
    # Each cut is a stretch, so that a run that fails has written some.
    monkeypatch.setattr(
        importlib.import_module("icefall_kd.targets.batches"), "STRETCH", 0.01
    )

    def words(*more, cuts=in_cuts, out=tmp_path / "out.jsonl.gz"):
        options = ["--max-duration", 0.01, "--num-threads", 1]
        return ["dump", cuts, out, *teacher_words, *options, *more]

    return words


@pytest.fixture
def teacher(teacher_exp):
    return load_recipe_model(teacher_exp.recipe, teacher_exp.folder, epoch=2)[0]


# Where models are many and their loading is not what is tested


@pytest.fixture(scope="session")
def _loaded():
    return {}


@pytest.fixture
def loaded_once(monkeypatch, _loaded):
    """Build each model once, which takes longer than a command with it."""

    def load(*args):
        key = tuple(map(str, args))
        if key not in _loaded:
            _loaded[key] = load_recipe_model(*args)
        model, settings = _loaded[key]
        return model, dict(settings)

    monkeypatch.setattr(loader, "load_recipe_model", load)


@pytest.fixture(scope="session")
def talking_exp(teacher_exp, tmp_path_factory):
    """The small model, untrained, with less of blank: its transducer finds tokens."""
    folder = tmp_path_factory.mktemp("talking")
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    checkpoint["model"]["joiner.output_linear.bias"][0] -= 2
    torch.save(checkpoint, folder / "epoch-2.pt")
    return folder


@pytest.fixture(scope="session")
def another_exp(teacher_exp, make_model, tmp_path_factory):
    """An experiment folder with epoch 2 of another model, and that model."""
    made = {}

    def make(seed=5, **changes):
        key = (seed, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("another")
            changes = {"vocab_size": 25, **changes}
            model = make_model(seed=seed, **changes).eval()
            path = teacher_exp.folder / "epoch-2.pt"
            checkpoint = torch.load(path, weights_only=False)
            checkpoint.update(changes, model=model.state_dict())
            torch.save(checkpoint, folder / path.name)
            made[key] = folder, model
        return made[key]

    return make


@pytest.fixture(scope="session")
def hear():
    """What a model says on one cut alone; with labels ``y``, its lattice."""

    def ask(model, cut, hidden=(), ctc=True, y=None, **options):
        flags = [(p, p.requires_grad) for p in model.parameters()]
        # Zipformer takes other kernels for frozen parameters, another last bit.
        model.requires_grad_(False)
        try:
            with ModelTap(model, hidden, ctc) as hook:
                x = torch.from_numpy(cut.load_features()).unsqueeze(0)
                out = hook.encode(x, torch.tensor([x.size(1)]))
                return out if y is None else hook.lattice(out, [y], **options)
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)

    return ask


@pytest.fixture
def make_exp(tmp_path):
    """Write an experiment folder for a report."""
    return partial(write_exp, tmp_path)


@pytest.fixture
def three(make_exp, tmp_path):
    """Words for a teacher, a student and a distilled student."""
    make_exp("t", {"base_lr": 0.045}, 4.0, 4000)
    make_exp("s", {"base_lr": 0.045}, 8.0)
    make_exp("k", {"base_lr": 0.045, **KD}, 7.0)
    words = (("teacher", "t"), ("no KD", "s"), ("KD", "k"))
    return [w for n, f in words for w in ("--model", f"{n}={tmp_path / f}")]


@pytest.fixture
def fbank(make_cut, tmp_path):
    """A folder with the manifest of the test set."""
    folder = tmp_path / "fbank"
    folder.mkdir()
    path = folder / "librispeech_cuts_test-clean.jsonl.gz"
    CutSet.from_cuts([make_cut("a", 1000), make_cut("b", 3000)]).to_file(path)
    return folder
