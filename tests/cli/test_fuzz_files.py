"""Files that somebody else made, damaged: refused in one sentence, or read in part."""

import gzip
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest
import torch
from fuzzing import NOT_UTF8, check_refusal, run

from icefall_kd.cli import cli
from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import load_quantizer
from icefall_kd.plug.plug import RECORD, read_record
from icefall_kd.targets import Fingerprint
from icefall_kd.targets.reading import collate_targets
from icefall_kd.targets.store import FIELD, Pointer, read_fingerprint
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.tokens.characters import Characters
from icefall_kd.training.checkpoint import FILE, KDCheckpoint
from icefall_kd.training.clock import EpochClock
from icefall_kd.training.options import read_config

# What may stand in a JSON file where something else is looked for.
VALUES: List[Any] = [
    None,
    True,
    -1,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": []},
]


def cut_short(data: bytes) -> Iterator[bytes]:
    """The bytes of a file, cut, turned over, or in place of which others stand."""
    draw = random.Random(len(data))
    for n in (0, 1, len(data) // 2, len(data) - 1):
        yield data[:n]
    for _ in range(20):
        i, n = draw.randrange(len(data)), draw.randrange(1, 9)
        yield data[:i] + draw.randbytes(n) + data[i + n :]
        j = draw.randrange(len(data))
        yield data[: min(i, j)] + data[max(i, j) :]
    yield NOT_UTF8.encode("utf8", "surrogateescape") + data
    yield b"\0" * 50
    yield b"[" * 100_000
    yield b"9" * 5000


def refused_or_read(read: Callable[[], Any]) -> None:
    """No other error than a refusal of one line."""
    try:
        read()
    except KDError as e:
        assert "\n" not in e.sentence and len(e.sentence) < 2000


def changed(values: Dict[str, Any]) -> Iterator[Any]:
    """A dictionary with each field gone, and with each of VALUES in its place."""
    for name in values:
        yield {k: v for k, v in values.items() if k != name}
        for value in VALUES:
            yield {**values, name: value}
    yield {**values, "more": 1}
    yield from VALUES


def test_fingerprints(make_fingerprint, tmp_path):
    make_fingerprint(hidden="1:half").write(tmp_path)
    path = tmp_path / "fingerprint.json"
    data = path.read_bytes()
    others = [json.dumps(v).encode() for v in changed(json.loads(data))]
    for damaged in (*cut_short(data), *others):
        path.write_bytes(damaged)
        refused_or_read(lambda: Fingerprint.read(tmp_path).make_kinds())
    path.write_bytes(json.dumps({**json.loads(data), "vocab_size": "11"}).encode())
    with pytest.raises(KDError, match="is damaged or of another version"):
        Fingerprint.read(tmp_path)


def test_pointers(make_cut, make_store):
    (cut,) = make_store([make_cut("c1", 47)])
    for value in changed(cut.custom[FIELD]):
        cut.custom = {FIELD: value}
        read_fingerprint.cache_clear()
        refused_or_read(lambda: collate_targets([cut]))


@pytest.mark.parametrize(
    "value", ["x", 3, {"store": []}], ids=["text", "number", "lacking"]
)
def test_a_pointer_of_another_type_is_refused_by_the_cuts_name(make_cut, value):
    cut = make_cut("c1", 47)
    cut.custom = {FIELD: value}
    with pytest.raises(KDError, match=f"the field {FIELD} of cut c1 is damaged"):
        Pointer.of_cut(cut)


def test_symbols(tmp_path):
    path = tmp_path / "tokens.txt"
    data = "".join(
        f"{s} {i}\n" for i, s in enumerate(["<blk>", "<unk>", "一"])
    ).encode()
    for damaged in cut_short(data):
        path.write_bytes(damaged)
        refused_or_read(lambda: Characters(tmp_path).encode("一"))


def test_the_file_of_options(tmp_path):
    path = tmp_path / "kd.yaml"
    for damaged in cut_short(b"ctc-weight: 0.8\nhidden-layers: 3:2\n"):
        path.write_bytes(damaged)
        refused_or_read(lambda: read_config(str(path)))
    aliases = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n"
        for i in range(12)
    )
    path.write_text(aliases)  # 9 to the power of 12 texts
    refused_or_read(lambda: read_config(str(path)))


def test_the_record_of_a_working_copy(tmp_path):
    record = {
        "recipe": "../a",
        "version": "0",
        "leave_out": [],
        "plugged": ["train.py"],
    }
    record["files"] = {"train.py": "0" * 64}
    path = tmp_path / RECORD
    others = [json.dumps(v).encode() for v in changed(record)]
    for damaged in (*cut_short(json.dumps(record).encode()), *others):
        path.write_bytes(damaged)
        refused_or_read(lambda: read_record(tmp_path))


def test_quantizers(tmp_path):
    pytest.importorskip("multi_quantization")
    path = tmp_path / "q.pt"
    for values in changed({"dim": 4, "codes": 1, "state": {}}):
        torch.save(values, path)
        refused_or_read(lambda: load_quantizer(path))
    for damaged in cut_short(path.read_bytes()):
        path.write_bytes(damaged)
        refused_or_read(lambda: load_quantizer(path))


def test_the_progress_of_a_training(tmp_path):
    def read(**params):
        params["exp_dir"] = tmp_path
        KDCheckpoint(params, EpochClock(params))

    path = tmp_path / FILE
    for values in changed({"first_epoch": 1, "at": {}, "thawed": {}}):
        torch.save(values, path)
        refused_or_read(lambda: read(start_epoch=2))
    for damaged in cut_short(path.read_bytes()):
        path.write_bytes(damaged)
        refused_or_read(read)


@pytest.fixture
def exp_dir(tmp_path, teacher_exp):
    folder = tmp_path / "exp"
    folder.mkdir()
    shutil.copy(teacher_exp.folder / "epoch-2.pt", folder)
    return folder


def test_checkpoints(exp_dir, teacher_exp):
    path = exp_dir / "epoch-2.pt"
    data = path.read_bytes()
    checkpoint = torch.load(path, weights_only=False)

    def load() -> None:
        load_recipe_model(teacher_exp.recipe, exp_dir, 2)

    for damaged in (b"", b"x" * 99, data[:100_000], data[:-1], b"[" * 100_000):
        path.write_bytes(damaged)
        with pytest.raises(KDError):
            load()
    for name in ("model", "vocab_size", "encoder_dim", "feature_dim", "blank_id"):
        for value in (None, -1, "x", [], {"a": 1}, float("nan")):
            torch.save({**checkpoint, name: value}, path)
            with pytest.raises(KDError):
                load()
    for name in ("batch_idx_train", "average_period"):
        for value in (None, -1, "x", [], float("nan")):
            torch.save({**checkpoint, name: value}, path)
            refused_or_read(load)


# Whole commands on damaged files


def icefall_kd(*words: Any) -> str:
    """What is wrong with how a command ended; "" for nothing."""
    done = run(lambda: cli([str(w) for w in words], prog_name="icefall-kd"))
    return done.fault if done.status == 0 else check_refusal(done)


LOG = """\
2025-03-04 08:00:00,000 INFO [train.py:1] {"max_duration": 60, "base_lr": 0.04,
 "kd_ctc_weight": 1.0, "world_size": 2, "device": "cpu"}
2025-03-04 08:00:01,000 INFO [train.py:1] Number of model parameters: 9
2025-03-04 08:00:02,000 INFO [train.py:1] Epoch 1, batch 0, loss[loss=1.5, over 40.00 \
frames. ], tot_loss[loss=1.5, ctc_loss=2.5, over 40.00 frames. ], batch size: 5
2025-03-04 08:00:03,000 INFO [train.py:1] Epoch 1, validation: loss=1, over 9 frames.
"""
SUFFIX = "epoch-3-avg-1"


@pytest.fixture
def experiment(tmp_path):
    """The folder of a training and a decoding, and its files."""
    files = {
        "log/log-train-2025-03-04-05-06-07": LOG,
        f"greedy_search/wer-summary-test-{SUFFIX}.txt": "settings\tWER\nx\t5.25\n",
        f"greedy_search/log-decode-{SUFFIX}-2025-03-04-05-06-07": LOG
        + "2025-03-04 08:00:03,000 INFO [decode.py:1] [test] %WER 5.25% [1 / 2]\n",
        f"fast/errs-test-{SUFFIX}.txt": "%WER = 5.25\n",
    }
    for name, text in files.items():
        path = tmp_path / "exp" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "exp", [tmp_path / "exp" / name for name in files]


def report_words(exp: Path) -> List[Any]:
    return ["report", "--model", f"a={exp}", "--model", f"b={exp}", exp.parent / "out"]


@pytest.mark.parametrize("i", range(4), ids=["training", "summary", "decoding", "errs"])
def test_logs_and_results(experiment, i):
    pytest.importorskip("matplotlib")
    exp, paths = experiment
    data = paths[i].read_bytes()
    swaps = [
        (b"03-04 08:00:0", b"13-04 08:00:0"),
        (b"60", b"1" + 400 * b"0"),
        (b"60", b'{"a": [1]}'),
        (b'"cpu"', b'"\\ud800"'),
        (b"0.04", b"NaN"),
        (b"Epoch 1,", b"Epoch " + 5000 * b"9" + b","),
        (b"parameters: 9", b"parameters: " + 5000 * b"9"),
        (b"1.5", b"1e999"),
        (b"5.25", b"1.2.3"),
        (b"5.25", b"nan"),
    ]
    damaged = [data.replace(old, new) for old, new in swaps if old in data]
    faults = []
    for bytes_ in (*damaged, *list(cut_short(data))[::8]):
        paths[i].write_bytes(bytes_)
        fault = icefall_kd(*report_words(exp))
        if fault:
            faults.append(f"{bytes_[:60]!r}: {fault}")
    assert not faults, "\n".join(faults)


def test_entries_of_no_date_are_left_out_and_counted(experiment):
    pytest.importorskip("matplotlib")
    exp, paths = experiment
    paths[0].write_text(LOG.replace("03-04 08:00:03", "13-04 08:00:03"))
    assert icefall_kd(*report_words(exp)) == ""
    page = (exp.parent / "out" / "report.md").read_text()
    assert "a: 1 entries of its logs have an impossible date" in page


@pytest.mark.skipif(sys.platform != "linux", reason="names there are UTF-8")
def test_names_that_are_not_utf8(experiment):
    pytest.importorskip("matplotlib")
    exp, paths = experiment
    for path in paths[1:]:
        path.rename(path.with_name(path.name.replace("test-", f"{NOT_UTF8}-")))
    (exp / "fast").rename(exp / NOT_UTF8)
    assert icefall_kd(*report_words(exp)) == ""
    assert "\ufffdt\ufffd" in (exp.parent / "out" / "report.md").read_text("utf8")


def test_manifests(make_cut, make_store, teacher_exp, tmp_path, monkeypatch):
    """Each command that reads cuts, on manifests whose cuts are damaged."""
    monkeypatch.chdir(tmp_path)
    cuts = make_store([make_cut("c1", 47), make_cut("c2", 33)], vocab_size=25)
    first, second = (cut.to_dict() for cut in cuts)
    path = tmp_path / "damaged.jsonl.gz"
    teacher = ["--recipe", teacher_exp.recipe, "--exp-dir", teacher_exp.folder]
    teacher += ["--epoch", 2, "--use-averaged-model", 0]
    (tmp_path / "exp" / "log").mkdir(parents=True)
    (tmp_path / "exp" / "log" / "log-train-2025-03-04-05-06-07").write_text(LOG)
    commands = [
        ["combine", path, "out.jsonl.gz", "--num-jobs", 1],
        ["shar", path, "shar"],
        ["doctor", *teacher, "--cuts", path],
    ]
    try:
        import matplotlib  # noqa: F401

        commands.append(
            ["report", "--model", "a=exp", "--targets", path, tmp_path / "out"]
        )
    except ImportError:
        pass
    cuts.to_file("out.jsonl.gz")
    (tmp_path / "shar").mkdir()
    cuts.to_shar("shar", fields={"features": "numpy"}, warn_unused_fields=False)
    pointers = [
        {**second, "custom": {FIELD: value}}
        for value in list(changed(second["custom"][FIELD]))[::12]
    ]
    lines = [*list(changed(second))[::12], *pointers]
    faults = []
    for damaged in lines:
        text = "".join(json.dumps(line) + "\n" for line in (first, damaged))
        path.write_bytes(gzip.compress(text.encode()))
        faults += _faults(commands, damaged)
    data = path.read_bytes()
    for n in (0, 9, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:n])
        faults += _faults(commands, n)
    assert not faults, "\n".join(faults)


def _faults(commands: List[List[Any]], what: Any) -> Iterator[str]:
    for words in commands:
        fault = icefall_kd(*words)
        if fault:
            yield f"{words[0]} {what!r:.300}: {fault:.400}"
