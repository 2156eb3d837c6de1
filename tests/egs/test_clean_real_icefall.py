"""An online teacher that hears clean features, in icefall's own LibriSpeech recipe.

See ``test_kd_real_icefall.py`` for what these tests need.
"""

import json
import sys

import pytest
from test_kd_real_icefall import (  # noqa: F401  (fixtures)
    SIZE,
    _run,
    icefall,
    librispeech,
    make_teacher,
)

# What compute_loss of a plugged train.py logs of the first batch.
FIRST_BATCH = """
import json, sys
recipe, *flags = sys.argv[1:]
sys.argv = [f"{recipe}/train.py", *flags]
sys.path.insert(0, recipe)
import sentencepiece as spm
import torch
import train
from asr_datamodule import LibriSpeechAsrDataModule
from lhotse.utils import fix_random_seed
parser = train.get_parser()
LibriSpeechAsrDataModule.add_arguments(parser)
args = parser.parse_args()
params = train.get_params()
params.update(vars(args))
sp = spm.SentencePieceProcessor()
sp.load(params.bpe_model)
params.update(blank_id=0, vocab_size=sp.get_piece_size())
fix_random_seed(1)
model = train.get_model(params)
train.kd.attach(params, model)
data = LibriSpeechAsrDataModule(args)
batches = data.train_dataloaders(data.train_clean_100_cuts())
spec_augment = train.get_spec_augment(params) if params.use_cr_ctc else None
fix_random_seed(2)
batch = next(iter(batches))
fix_random_seed(3)
loss, info = train.compute_loss(
    params=params, model=model, sp=sp, batch=batch, is_training=True,
    spec_augment=spec_augment,
)
loss.backward()
fields = sorted(key for key in batch if key.startswith("kd_"))
print("RESULT", json.dumps([{k: float(v) for k, v in info.items()}, fields]))
"""
FLAGS = "--full-libri 0 --enable-musan 0 --max-duration 12 --num-workers 0"
FLAGS += " --num-buckets 2"
TERMS = "--kd-ctc-weight 1 --kd-hidden-weight 1 --kd-hidden-layers out:out,0:0"
CASES = {
    "time warp off": ("--enable-spec-aug 1", TERMS + " --kd-rnnt-weight 1"),
    "time warp followed": ("--enable-spec-aug 1", TERMS + " --kd-time-warp follow"),
    "CR-CTC": ("--use-cr-ctc 1 --enable-spec-aug 0", TERMS + " --kd-rnnt-weight 1"),
    "condition": ("--enable-spec-aug 1", TERMS + " --kd-condition better"),
}


@pytest.fixture(scope="module")
def first_batch(librispeech, make_teacher):  # noqa: F811
    """A plugged recipe, and the teacher's targets in a store."""
    asr, lang = librispeech.asr, librispeech.lang
    bpe = lang / "bpe.model"
    teacher = make_teacher("clean teacher", "--causal 0 --use-ctc 1")

    def command(*words):
        code = "from icefall_kd.cli import main; main()"
        _run(sys.executable, "-c", code, *words, env=librispeech.env, cwd=asr)

    command("plug", "./zipformer", "./zipformer_clean")
    fbank, stored = asr / "data" / "fbank", asr / "data" / "kd clean"
    name = "librispeech_cuts_train-clean-100.jsonl.gz"
    of_teacher = ["--exp-dir", teacher, "--epoch", "2", "--bpe-model", bpe]
    forms = ["--keep", "dense", "--keep-lattice", "dense", "--keep-hidden"]
    command(
        *["dump", fbank / name, stored / name, "--recipe", "./zipformer"],
        *[*of_teacher, *forms, "out:half,0:half", "--num-workers", "0"],
    )

    def run(manifests, *flags):
        words = [*SIZE.split(), *FLAGS.split(), "--use-ctc", "1", *flags]
        words += ["--bpe-model", bpe, "--manifest-dir", manifests]
        program = [sys.executable, "-c", FIRST_BATCH, "./zipformer_clean"]
        out = _run(*program, *words, env=librispeech.env, cwd=asr)
        (line,) = [x for x in out.splitlines() if x.startswith("RESULT ")]
        return json.loads(line[len("RESULT ") :])

    online = [f"--kd-{x}" for x in ("teacher-exp-dir", "teacher-epoch")]
    online = [online[0], teacher, online[1], "2", "--kd-teacher-recipe", "./zipformer"]
    return lambda *flags: (
        run(stored, *flags),
        run(fbank, *flags, *online, "--kd-teacher-clean", "true"),
        run(fbank, *flags, *online),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_clean_teacher_teaches_what_its_store_does(first_batch, name):
    augment, terms = CASES[name]
    stored, clean, masked = first_batch(*augment.split(), *terms.split())
    assert stored[1] == ["kd_targets"] and "kd_clean_inputs" in clean[1]
    assert ("kd_time_warps" in clean[1]) == ("follow" in terms)
    assert stored[0].keys() == clean[0].keys()
    for key, value in stored[0].items():
        assert clean[0][key] == pytest.approx(value, rel=5e-3, abs=1e-2), key
    apart = abs(masked[0]["kd_hidden_loss"] / clean[0]["kd_hidden_loss"] - 1)
    assert apart < 1e-6 if name == "CR-CTC" else apart > 1e-3
