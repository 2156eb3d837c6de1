"""Small real models, cuts and target stores, made anew from fixed seeds."""

import os
import random
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "egs" / "digits" / "ASR" / "zipformer"
VOCAB = 11
SAMPLING_RATE = 8000

SMALL = {
    "feature_dim": 20,
    "sample_rate": SAMPLING_RATE,
    "num_encoder_layers": "2,3",
    "downsampling_factor": "1,2",
    "feedforward_dim": "24,32",
    "num_heads": "4,4",
    "encoder_dim": "16,24",
    "encoder_unmasked_dim": "8,12",
    "query_head_dim": "8",
    "pos_head_dim": "4",
    "value_head_dim": "6",
    "pos_dim": 16,
    "cnn_module_kernel": "7,5",
    "decoder_dim": 16,
    "joiner_dim": 20,
    "use_cr_ctc": False,
    "vocab_size": VOCAB,
    "blank_id": 0,
    "sos_id": 1,
    "eos_id": 1,
}

# Put before a program's code: it can't import these modules.
_BLOCK = """
import sys
import threading
class _Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, _Block())
"""


def pytest_configure(config):
    # zipformer compiles its activations: that takes longer than all tests together.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ignored where a script runs the tests in the background: then programs that the
    # tests stop by Ctrl-C would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Under nohup a program, and all that it starts, ignores SIGHUP.
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    hypothesis_settings.register_profile(
        "icefall_kd", deadline=None, derandomize=True, database=None, max_examples=40
    )
    hypothesis_settings.load_profile("icefall_kd")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers(request):
    """A test draws the same random numbers each time, and each test its own."""
    import torch

    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _forget_recipes(path):
    sys.path[:] = path
    for name in ("train", "asr_datamodule"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def as_found():
    """Undo what a session or the import of a recipe leaves in the process."""
    excepthook, path = sys.excepthook, list(sys.path)
    yield
    sys.excepthook = excepthook
    _forget_recipes(path)
    session = sys.modules.get("icefall_kd.training.session")
    if session is not None:
        session.detach()
    places = sys.modules.get("icefall_kd.targets.places")
    if places is not None:
        places.forget()


# Programs


@pytest.fixture
def run_python(tmp_path):
    """Run Python code in a process of its own, in an empty folder."""

    def run(code, *args, block=()):
        folder = tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        path = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        return subprocess.run(
            [sys.executable, "-c", _BLOCK.format(names=set(block)) + code]
            + [str(a) for a in args],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def in_child():
    """Run a function in a forked process; return its exit status, -9 if killed."""

    def run(function):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                # The lock of all bars is shared with the parent: a child that is
                # killed while it holds it would stop all others.
                tqdm.set_lock(threading.RLock())
                function()
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(pid, 0)[1]
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status >> 8

    return run


@pytest.fixture(scope="session")
def tree_of():
    """All files below a folder, with their bytes."""

    def tree(folder):
        return {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(Path(folder).rglob("*"))
            if p.is_file()
        }

    return tree


# Losses


def _naive_kd(student, teacher, lengths, temperature):
    """sum over n and t < lengths[n] of T^2 KL(softmax(z~/T) || softmax(z/T))."""
    import torch.nn.functional as F

    total = student.new_zeros(())
    for n, length in enumerate(lengths.tolist()):
        for t in range(length):
            p = F.softmax(teacher[n, t] / temperature, dim=-1)
            q = F.softmax(student[n, t] / temperature, dim=-1)
            total = total + (p * (p.log() - q.log())).sum()
    return total * temperature**2


@pytest.fixture(scope="session")
def naive_kd():
    return _naive_kd


# Models


def _settings(**changes):
    import argparse

    from zipformer.bin.train import add_model_arguments
    from zipformer.utils import AttributeDict

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    settings = AttributeDict(vars(parser.parse_args([])))
    settings.update({"subsampling_factor": 4, "ignore_id": -1, "label_smoothing": 0.1})
    settings.update(SMALL)
    settings.update(changes)
    return settings


def _model(seed=0, shaken=True, **changes):
    import torch
    from recipe_model import get_model
    from zipformer.modules import model as zipformer_model

    from icefall_kd.rnnt import get_engine

    zipformer_model.k2 = get_engine()
    torch.manual_seed(seed)
    model = get_model(_settings(**changes))
    if shaken:  # no parameter is 0 or equal to its neighbour, as after training
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def make_settings():
    """The settings of a small model, some of them changed."""
    return _settings


@pytest.fixture(scope="session")
def make_model():
    """A small AsrModel of the package zipformer, some settings changed."""
    return _model


@pytest.fixture
def features():
    """A batch of three utterances: (3, 61, 20) and their lengths."""
    import torch

    x = torch.randn(3, 61, 20, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([61, 42, 23])


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    """torch.distributed, in one process."""
    import torch.distributed as dist

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def bpe_models(tmp_path_factory):
    """BPE models of 25, 25 and 26 pieces, and two of the same pieces in two orders."""
    import io

    import sentencepiece as spm

    words = "zero one two three four five six seven eight nine".split()
    folder = tmp_path_factory.mktemp("bpe")

    def train(name, vocab_size, sentences):
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            user_defined_symbols=["<blk>", "<sos/eos>"],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        path = folder / f"{name}.model"
        path.write_bytes(model.getvalue())
        return path

    digits = [" ".join(words)]
    return SimpleNamespace(
        a=train("a", 25, digits + ["zero"] * 30),
        b=train("b", 25, digits + ["seven"] * 30),
        larger=train("larger", 26, digits + ["zero"] * 30),
        ab=train("ab", 12, ["ab"] * 30 + ["cd"] * 10),
        ba=train("ba", 12, ["ab"] * 10 + ["cd"] * 30),
    )


# Cuts and stores


def frames_of(num_frames):
    """Encoder frames of so many feature frames."""
    from icefall_kd import encoder_frames

    return encoder_frames(num_frames)


@pytest.fixture(scope="session")
def encoder_frames():
    return frames_of


def _cut_maker(folder):
    from lhotse import AudioSource, Features, MonoCut, Recording, SupervisionSegment
    from lhotse.features.io import NumpyFilesWriter

    def make(cut_id, num_frames, start=0.0, num_features=20, text="ein"):
        duration = num_frames / 100
        rng = np.random.default_rng(sum(cut_id.encode()) + num_frames)
        array = rng.normal(size=(num_frames, num_features)).astype(np.float32)
        writer = NumpyFilesWriter(folder / "feats")
        features = Features(
            type="kaldi-fbank",
            num_frames=num_frames,
            num_features=num_features,
            frame_shift=0.01,
            sampling_rate=SAMPLING_RATE,
            start=start,
            duration=duration,
            storage_type=writer.name,
            storage_path=str(writer.storage_path),
            storage_key=writer.write(cut_id, array),
            recording_id=cut_id,
            channels=0,
        )
        recording = Recording(
            id=cut_id,
            sources=[AudioSource(type="command", channels=[0], source="false")],
            sampling_rate=SAMPLING_RATE,
            num_samples=round((start + duration) * SAMPLING_RATE),
            duration=start + duration,
        )
        supervision = SupervisionSegment(
            id=cut_id, recording_id=cut_id, start=0, duration=duration, text=text
        )
        return MonoCut(
            id=cut_id,
            start=start,
            duration=duration,
            channel=0,
            features=features,
            recording=recording,
            supervisions=[supervision],
        )

    return make


@pytest.fixture
def multi_cut(make_cut):
    """A cut of two channels, whose features are of one."""
    from dataclasses import replace

    from lhotse import MultiCut

    def make(cut_id, num_frames):
        cut = make_cut(cut_id, num_frames)
        recording = replace(
            cut.recording,
            sources=[replace(cut.recording.sources[0], channels=[0, 1])],
            channel_ids=[0, 1],
        )
        values = dict(vars(cut), channel=[0, 1], recording=recording)
        return MultiCut(**values)

    return make


@pytest.fixture
def make_cut(tmp_path):
    """A cut with stored features; its recording has no audio."""
    return _cut_maker(tmp_path)


@pytest.fixture(scope="session")
def make_cut_in():
    """``make_cut`` of a folder."""
    return _cut_maker


@pytest.fixture(scope="session")
def make_fingerprint():
    from icefall_kd.targets import Fingerprint

    def make(**changes):
        values = {
            "teacher": "a" * 64,
            "tokens": "",
            "vocab_size": VOCAB,
            "blank_id": 0,
            "subsampling_factor": 4,
            "frame_shift": 0.04,
            "sampling_rate": SAMPLING_RATE,
            "num_features": 20,
            "feature_type": "kaldi-fbank",
        }
        return Fingerprint(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def make_logits():
    """A teacher's logits of a cut, of the right length."""
    import torch

    def make(cut, seed=0, vocab_size=VOCAB, scale=4.0):
        generator = torch.Generator().manual_seed(seed + sum(cut.id.encode()))
        size = (frames_of(cut.num_frames), vocab_size)
        return scale * torch.randn(size, generator=generator)

    return make


@pytest.fixture
def make_store(tmp_path, make_fingerprint, make_logits):
    """Store targets of cuts; return the cuts that carry them."""
    from lhotse import load_manifest

    from icefall_kd.targets import TargetWriter

    def make(cuts, name="kd", **changes):
        manifest = tmp_path / f"{name}.jsonl.gz"
        fingerprint = make_fingerprint(**changes)
        with TargetWriter(manifest, tmp_path / name, fingerprint) as writer:
            for cut in cuts:
                logits = make_logits(cut, vocab_size=fingerprint.vocab_size)
                writer.write(cut, logits)
        return load_manifest(manifest).to_eager()

    return make


@pytest.fixture(scope="session")
def read_targets():
    """The CTC targets that a cut carries."""
    from icefall_kd.targets.reading import collate_targets
    from icefall_kd.types import index_rows

    def read(cut):
        return index_rows(collate_targets([cut], kinds=["ctc"]).parts["ctc"], 0)

    return read


@pytest.fixture(scope="session")
def stored_form(make_logits):
    """What a reader of a dense store finds of a cut's logits."""

    def stored(cut, seed=0, **options):
        logits = make_logits(cut, seed, **options)
        return logits.log_softmax(-1).half().float().log_softmax(-1)

    return stored


# The digits recipe


@pytest.fixture
def recipe():
    """The train module of the digits recipe."""
    from icefall_kd.teacher.recipe import import_train

    return import_train(RECIPE)


@pytest.fixture(scope="session")
def teacher_exp(tmp_path_factory, bpe_models):
    """Checkpoints of small models, written by the digits recipe's own functions."""
    import copy

    import torch
    from lhotse import CutSet
    from lhotse.dataset import SimpleCutSampler

    from icefall_kd.teacher.recipe import import_train

    path = list(sys.path)
    try:
        train = import_train(RECIPE)
        folder = tmp_path_factory.mktemp("teacher")
        params = train.get_params()
        params.update(vars(train.get_parser().parse_args([])))
        params.update({**SMALL, "vocab_size": 25, "exp_dir": folder})
        GradScaler = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
        models, averaged = {}, {}
        for i, name in enumerate(
            ("epoch-1", "epoch-2", "checkpoint-5", "checkpoint-10", "checkpoint-20")
        ):
            model = _model(seed=i, vocab_size=25)
            model_avg = copy.deepcopy(_model(seed=10 + i, vocab_size=25)).double()
            params.batch_idx_train = int(name.split("-")[1]) * (
                10 if "epoch" in name else 1
            )
            optimizer = train.get_optimizer(params, model)
            train.save_checkpoint(
                folder / f"{name}.pt",
                params,
                model,
                model_avg,
                optimizer,
                train.get_scheduler(params, optimizer),
                SimpleCutSampler(CutSet.from_cuts([]), max_duration=1.0),
                GradScaler(enabled=False),
            )
            models[name], averaged[name] = model.eval(), model_avg
    finally:
        _forget_recipes(path)
    return SimpleNamespace(
        folder=folder,
        recipe=RECIPE,
        settings=params,
        models=models,
        averaged=averaged,
        bpe_model=bpe_models.a,
    )
