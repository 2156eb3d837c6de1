"""``kd.sh`` from checks to report on icefall's own, unmodified scripts.

These tests need k2, what icefall imports (tools/make_k2_env.sh --icefall), and icefall:
the environment variable ICEFALL_DIR names its top folder. Models and cuts are tiny and
random; what is tested is that each script takes what it is given.
"""

import json
import os
import shlex
import subprocess
import sys
import wave
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from kd_stand_ins import SCRIPT

ROOT = Path(__file__).resolve().parents[2]
WORDS = "zero one two three four five six seven eight nine".split()
SIZE = (
    "--downsampling-factor 1,2 --num-encoder-layers 1,1 --feedforward-dim 32,48 "
    "--num-heads 4,4 --encoder-dim 24,32 --encoder-unmasked-dim 24,32 "
    "--cnn-module-kernel 15,15 --decoder-dim 32 --joiner-dim 32"
)

# Writes the checkpoints of two epochs of an untrained model, as train.py would.
MAKE_TEACHER = """
import sys
from pathlib import Path
import sentencepiece as spm
import torch
recipe, folder, bpe, *flags = sys.argv[1:]
sys.path.insert(0, recipe)
import train
params = train.get_params()
params.update(vars(train.get_parser().parse_args(flags)))
sp = spm.SentencePieceProcessor()
sp.load(bpe)
params.update(blank_id=0, vocab_size=sp.get_piece_size(), average_period=1)
torch.manual_seed(0)
state = train.get_model(params).state_dict()
average = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
Path(folder).mkdir(parents=True)
for epoch in (1, 2):
    params.update(batch_idx_train=10 * epoch)
    checkpoint = {"model": state, "model_avg": average, **params}
    torch.save(checkpoint, f"{folder}/epoch-{epoch}.pt")
"""


def _run(*words, **options):
    done = subprocess.run(
        [str(w) for w in words], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def icefall():
    pytest.importorskip("k2")
    if "ICEFALL_DIR" not in os.environ:
        pytest.skip("the environment variable ICEFALL_DIR is not set")
    folder = Path(os.environ["ICEFALL_DIR"]).resolve()
    recipe = folder / "egs" / "librispeech" / "ASR" / "zipformer"
    if not (recipe / "train.py").is_file():
        pytest.fail(f"ICEFALL_DIR is {folder}, which has no librispeech/ASR/zipformer")
    return folder


def _cuts(folder):
    """Five sets of cuts of noise, named as LibriSpeech's."""
    from lhotse import (
        CutSet,
        Fbank,
        FbankConfig,
        Features,
        MonoCut,
        Recording,
        SupervisionSegment,
    )
    from lhotse.features.io import NumpyFilesWriter

    rng = np.random.default_rng(0)
    sets = {"train-clean-100": 10, "dev-clean": 5, "dev-other": 5}  # buckets: 10
    sets.update({"test-clean": 10, "test-other": 10})
    writer, fbank = NumpyFilesWriter(folder / "feats"), Fbank(FbankConfig())
    for name, count in sets.items():
        cuts = []
        for i in range(count):
            cut_id, frames = f"{name}-{i}", 110 + 7 * i
            duration = frames / 100
            samples = (rng.normal(size=160 * frames) * 3000).astype("<i2")
            path = folder / f"{cut_id}.wav"
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(samples.tobytes())
            recording = Recording.from_file(path, recording_id=cut_id)
            audio = samples.astype(np.float32)[None] / 32768
            array = np.asarray(fbank.extract(audio, 16000))
            features = Features(
                type="kaldi-fbank",
                num_frames=len(array),
                num_features=80,
                frame_shift=0.01,
                sampling_rate=16000,
                start=0,
                duration=duration,
                storage_type=writer.name,
                storage_path=str(writer.storage_path),
                storage_key=writer.write(cut_id, array),
                recording_id=cut_id,
                channels=0,
            )
            text = " ".join(rng.choice(WORDS, size=2))
            supervision = SupervisionSegment(cut_id, cut_id, 0, duration, text=text)
            cuts.append(
                MonoCut(
                    id=cut_id,
                    start=0,
                    duration=duration,
                    channel=0,
                    features=features,
                    recording=recording,
                    supervisions=[supervision],
                )
            )
        CutSet.from_cuts(cuts).to_file(folder / f"librispeech_cuts_{name}.jsonl.gz")


@pytest.fixture(scope="module")
def librispeech(icefall, tmp_path_factory, bpe_models):
    """A librispeech/ASR of links to icefall's, with data of its own."""
    import sentencepiece as spm

    top = tmp_path_factory.mktemp("kd") / "my icefall"
    asr = top / "egs" / "librispeech" / "ASR"
    (asr / "data" / "fbank").mkdir(parents=True)
    (top / "icefall").symlink_to(icefall / "icefall")
    original = icefall / "egs" / "librispeech" / "ASR"
    (asr / "zipformer").symlink_to(original / "zipformer")
    _cuts(asr / "data" / "fbank")
    lang = asr / "data" / "my lang"
    lang.mkdir()
    (lang / "bpe.model").write_bytes(bpe_models.a.read_bytes())
    sp = spm.SentencePieceProcessor()
    sp.load(str(lang / "bpe.model"))
    tokens = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    special = ["<eps>", "!SIL", "<SPOKEN_NOISE>", "<UNK>"]
    words = [*special, *sorted(WORDS), "#0", "<s>", "</s>"]
    for name, symbols in (("tokens.txt", tokens), ("words.txt", words)):
        lines = [f"{symbol} {i}\n" for i, symbol in enumerate(symbols)]
        (lang / name).write_text("".join(lines), "utf8")
    command = top / "bin" / "icefall-kd"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom icefall_kd.cli import main\nmain()\n")
    command.chmod(0o755)
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{top}",
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
    }
    prepare = original / "local" / "prepare_lang_bpe.py"
    _run(sys.executable, prepare, "--lang-dir", lang, env=env)
    return SimpleNamespace(asr=asr, lang=lang, env=env)


@pytest.fixture(scope="module")
def make_teacher(librispeech):
    def make(name, flags, change=""):
        folder = librispeech.asr / "zipformer exp" / name
        words = [librispeech.asr / "zipformer", folder, librispeech.lang / "bpe.model"]
        words += [*SIZE.split(), *flags.split()]
        average = "average = "
        script = MAKE_TEACHER.replace(average, f"{change}\n{average}", 1)
        _run(sys.executable, "-c", script, *words, env=librispeech.env)
        return folder.relative_to(librispeech.asr)

    return make


@pytest.fixture
def kd(librispeech):
    def run(name, teacher, *more):
        lang = librispeech.lang
        words = [SCRIPT, "--asr-dir", librispeech.asr, "--python", sys.executable]
        words += [
            "--teacher-exp-dir",
            teacher,
            "--teacher-epoch",
            2,
            "--teacher-avg",
            1,
        ]
        words += ["--tokens", f"--bpe-model {shlex.quote(str(lang / 'bpe.model'))}"]
        words += ["--tokens-file", lang / "tokens.txt", "--student", "tiny"]
        flags = "--full-libri 0 --enable-musan 0 --use-fp16 0 --num-buckets 2"
        flags += " --max-duration 12 --num-workers 0 --average-period 1"
        words += ["--train-flags", flags]
        for option in ("--first-epochs", "--last-epochs"):
            words += [option, 0]
        words += ["--kd-epochs", 1, "--avg", 1, "--baseline", "false"]
        words += ["--decode-flags", "--max-duration 20 --num-workers 0"]
        words += ["--chunk-size", 16, "--left-context-frames", 64]
        if not find_spec("sherpa_onnx"):
            words += ["--export-flags", "--sherpa 0"]
        words += [
            "--targets-dir",
            f"data/kd {name}",
            "--exp-dir",
            f"exp,{name}:1",
            *more,
        ]
        return _run(*words, env=librispeech.env)

    return run


SLICES = "--set joiner-dim=16 --set decoder-dim=16"
CTC = "--use-ctc 1 --use-transducer 0"
CHUNKS = "_chunk-16_left-context-64"
JIT = "jit_script.pt", "jit_script_chunk_16_left_64.pt"
SUFFIX = "epoch-2-avg-1"
BEAM = "modified_beam_search"
# Flags of the teacher, what the student has of its own, how they are decoded, icefall's
# script for ONNX and what it writes.
CASES = {
    "causal-to-streaming": (
        "--causal 1 --use-ctc 1",
        SLICES,
        ["greedy_search", BEAM, "ctc-greedy-search"],
        "export-onnx-streaming.py",
        {f"{part}-{SUFFIX}-chunk-16-left-64" for part in ("encoder", "joiner")},
    ),
    "offline-to-offline": (
        f"--causal 0 {CTC}",
        "--set encoder-unmasked-dim=16,16",
        ["ctc-greedy-search"],
        "export-onnx-ctc.py",
        {"model"},
    ),
    "causal-to-offline": (
        "--causal 1",
        f"{SLICES} --set causal=0 --init random",
        ["greedy_search", BEAM],
        "export-onnx.py",
        {f"{part}-{SUFFIX}" for part in ("encoder", "joiner")},
    ),
    "offline-to-streaming": (
        f"--causal 0 {CTC}",
        "--set causal=1 --init random",
        ["ctc-greedy-search"],
        "export-onnx-streaming-ctc.py",
        {f"ctc-{SUFFIX}-chunk-16-left-64"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_stages_pass(kd, librispeech, make_teacher, name):
    flags, student_flags, methods, script, models = CASES[name]
    teacher = make_teacher(name, flags)
    scripts = f"icefall-kd export.py {script}"
    words = ["--student-flags", student_flags, "--export", scripts]
    out = kd(name, teacher, *words)
    asr = librispeech.asr
    student = asr / f"exp,{name}:1" / "kd"
    heard = {asr / teacher: name.startswith("causal"), student: "-streaming" in name}
    for folder, causal in heard.items():
        for method in methods:
            for test_set in ("test-clean", "test-other"):
                (summary,) = (folder / method).glob(f"wer-summary-{test_set}-*")
                assert (CHUNKS in summary.name) == causal
    # What targets were made with.
    target = "librispeech_cuts_train-clean-100_kd/fingerprint.json"
    fingerprint = json.loads((asr / f"data/kd {name}" / target).read_text())
    assert bool(fingerprint["ctc"]) == ("ctc-greedy-search" in methods)
    assert bool(fingerprint["lattice"]) == ("greedy_search" in methods)
    chunks = "chunk_size 16 left_context_frames 64"
    assert (chunks in fingerprint["teacher"]) == name.startswith("causal")
    # What was exported is what the student is: by us, and by the recipe's own scripts.
    result = json.loads((student / "export" / "parity.json").read_text())
    assert result["broken"] == []
    heads = {"transducer": "greedy_search", "ctc": "ctc-greedy-search"}
    heads = {head for head, method in heads.items() if method in methods}
    forms = {(row["form"], row["head"]) for row in result["forms"]}
    streams, by_sherpa = heard[student], bool(find_spec("sherpa_onnx"))
    for head in heads:
        assert ("torch", head) in forms and ("fp32", head) in forms
        assert ("torchscript", head) in forms
        assert (("sherpa-onnx fp32", head) in forms) == by_sherpa
    suffix = SUFFIX + "-chunk-16-left-64" * streams
    parts = {"encoder", "decoder", "joiner"} if "transducer" in heads else set()
    parts |= {"model"} if "ctc" in heads else set()
    exported = {path.name for path in (student / "export").glob("*.onnx")}
    assert exported == {f"{part}-{suffix}.onnx" for part in parts}
    assert (student / JIT[heard[student]]).is_file()
    assert not (student / JIT[not heard[student]]).exists()
    written = {path.stem for path in student.glob("*.onnx")}
    assert models <= written, written
    import onnxruntime

    for path in student.glob("*.onnx"):
        session = onnxruntime.InferenceSession(str(path))
        metadata = session.get_modelmeta().custom_metadata_map
        if "T" in metadata:  # of a streaming encoder
            assert metadata["decode_chunk_len"] == "32"
            assert metadata["left_context_len"] == "64,32"
    report = (asr / f"exp,{name}:1" / "report" / "report.md").read_text()
    assert "with KD" in report and "test-other" in report and "with KD" in out


def test_speech_without_transcripts_is_labelled_and_trained_on(
    kd, librispeech, make_teacher
):
    from lhotse import CutSet
    from lhotse.utils import fastcopy

    folder = librispeech.asr / "data" / "fbank"
    bare = [
        cut.with_id(f"bare-{cut.id}").map_supervisions(lambda s: fastcopy(s, text=None))
        for cut in CutSet.from_file(folder / "librispeech_cuts_dev-clean.jsonl.gz")
    ]
    CutSet.from_cuts(bare).to_file(folder / "bare.jsonl.gz")
    less_blank = 'state["ctc_output.1.bias"][0] -= 1'
    teacher = make_teacher("labels", "--use-ctc 1", less_blank)
    words = ["--unlabelled-manifests", "bare.jsonl.gz", "--mix-weights", "1 1"]
    words += ["--label-flags", "--decoding-method ctc-greedy-search"]
    words += ["--filter-flags", "--max-repeats 1000", "--student-flags", SLICES]
    out = kd("labels", teacher, *words, "--stop-stage", 5)
    mixed = librispeech.asr / "data/kd labels/librispeech_cuts_train-clean-100.jsonl.gz"
    names = [cut.id.startswith("bare-") for cut in CutSet.from_file(mixed)]
    assert sum(names) == len(names) - sum(names) > 0 and "of 5 cuts kept" in out
    log = next((librispeech.asr / "exp,labels:1/kd/log").glob("log-train-*"))
    assert "kd_pseudo_cuts=" in log.read_text()
    assert (librispeech.asr / "exp,labels:1" / "kd" / "epoch-2.pt").is_file()


@pytest.mark.parametrize(
    "flags", ["", "--causal 1 --chunk-size 16 --left-context-frames 64"]
)
def test_icefall_kd_decodes_to_the_files_of_icefalls_own_scripts(
    librispeech, make_teacher, flags
):
    """Cut by cut, as icefall lets the others of a batch influence an utterance."""
    name = "causal" if flags else "whole"
    less_blank = 'state["joiner.output_linear.bias"][0] -= 1'
    causal = "--causal 1" if flags else ""
    exp = make_teacher(f"decoded {name}", f"--use-ctc 1 {causal}", less_blank)
    asr, lang, env = librispeech.asr, librispeech.lang, librispeech.env
    model = ["--epoch", 2, "--avg", 1, *SIZE.split(), "--use-ctc", 1, *flags.split()]
    one_by_one = ["--max-duration", 1, "--num-workers", 0]
    searches = [
        ("decode.py", "greedy_search"),
        ("decode.py", "modified_beam_search"),
        ("ctc_decode.py", "ctc-greedy-search"),
    ]
    for script, method in searches[: 1 if flags else 3]:
        words = ["--exp-dir", exp, "--decoding-method", method]
        words += ["--bpe-model", lang / "bpe.model", *model, *one_by_one]
        more = ["--lang-dir", lang] if script == "ctc_decode.py" else []
        script = [sys.executable, f"zipformer/{script}", *more]
        _run(*script, *words, "--manifest-dir", "data/fbank", cwd=asr, env=env)
        for test_set in ("test-clean", "test-other"):
            cuts = f"data/fbank/librispeech_cuts_{test_set}.jsonl.gz"
            where = ["--recipe", "zipformer", "--cuts", cuts, "--res-dir", asr / "ours"]
            _run("icefall-kd", "decode", *where, *words, cwd=asr, env=env)
            theirs = sorted((asr / exp / method).glob(f"*-{test_set}[-_]*.txt"))
            assert len(theirs) == 3
            for path in theirs:
                ours = (asr / "ours" / path.name).read_text("utf8")
                expected = path.read_text("utf8")
                if path.name.startswith("errs-"):  # utterances in the order of batches
                    ours, expected = (sorted(x.splitlines()) for x in (ours, expected))
                assert ours == expected, path.name
            (recogs,) = (asr / exp / method).glob(f"recogs-{test_set}[-_]*.txt")
            assert "hyp=['" in recogs.read_text("utf8")
