"""``kd.sh`` with causal models and with models of one head, beside stand-ins."""

import pytest
from kd_stand_ins import given

CHUNKS = {"--chunk-size": "16", "--left-context-frames": "128"}
CTC, BOTH, TRANSDUCER = "--use-ctc True --use-transducer False", "--use-ctc True", ""
FINE = {"stage": 0, "stop_stage": 10, "baseline": "false"}


@pytest.fixture
def models(tmp_path):
    """Say what flags the teacher's checkpoint has, and the student's."""

    def write(teacher, student=None):
        (tmp_path / "teacher").write_text(teacher)
        (tmp_path / "student").write_text(teacher if student is None else student)

    return write


def chunks_of(row):
    return {option: given(row, option) for option in CHUNKS if option in row}


def command(rows, name):
    return [r for r in rows if r[:2] == ["icefall-kd", name]]


def on(rows, folder):
    """The calls that decode or export a model."""
    names = [r[1] if r[0] == "icefall-kd" else r[0] for r in rows]
    heard = [r for r, name in zip(rows, names) if "decode" in name or "export" in name]
    return [r for r in heard if given(r, "--exp-dir").endswith(folder)]


@pytest.mark.parametrize("teacher", [True, False], ids=["causal", "offline"])
@pytest.mark.parametrize("student", [True, False], ids=["streaming", "whole"])
def test_chunks_are_given_where_a_causal_model_is_heard(
    kd, calls, models, teacher, student
):
    flags = {True: f"{BOTH} --causal True", False: BOTH}
    models(flags[teacher], flags[student])
    done = kd(student_flags="--init random", **FINE)
    assert done.returncode == 0, done.stderr
    rows = calls()
    (dump,) = command(rows, "dump")
    first, second = command(rows, "doctor")
    teachers = CHUNKS if teacher else {}
    students = CHUNKS if student else {}
    assert chunks_of(dump) == chunks_of(second) == teachers
    # What the student trains with are the recipe's several chunks.
    (made,) = command(rows, "student")
    assert not chunks_of(made) and not chunks_of(first)
    assert not any(chunks_of(r) for r in rows if r[0] == "train.py")
    assert len(on(rows, "zipformer/exp")) == 3 and len(on(rows, "/kd")) == 4
    assert all(chunks_of(r) == teachers for r in on(rows, "zipformer/exp"))
    assert all(chunks_of(r) == students for r in on(rows, "/kd"))
    assert given(command(rows, "export")[0], "--forms") == "torchscript,onnx"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "offline"])
@pytest.mark.parametrize(
    "heads, scripts",
    [
        (CTC, ["ctc_decode.py"]),
        (TRANSDUCER, ["decode.py"]),
        (BOTH, ["ctc_decode.py", "decode.py"]),
    ],
    ids=["ctc", "transducer", "both"],
)
def test_each_head_has_its_scripts(kd, calls, models, heads, scripts, causal):
    models(heads + (" --causal True" if causal else ""))
    assert kd(**FINE).returncode == 0
    rows = calls()
    assert sorted({r[0] for r in on(rows, "zipformer/exp")}) == scripts
    assert sorted({r[0] for r in on(rows, "/kd")}) == [*scripts, "icefall-kd"]
    for row in on(rows, "/kd") + on(rows, "zipformer/exp"):
        assert ("--use-transducer" in row) == (heads == CTC)
        assert ("--use-ctc" in row) == (heads != TRANSDUCER)


@pytest.mark.parametrize(
    "heads, config, keep, lattice",
    [
        (CTC, "kd-ctc.yaml", "adaptive:0.999:16", None),
        (TRANSDUCER, "kd-transducer.yaml", "none", "adaptive:0.999:16"),
        (BOTH, "kd.yaml", "adaptive:0.999:16", "adaptive:0.999:16"),
    ],
    ids=["ctc", "transducer", "both"],
)
def test_only_heads_that_are_there_have_targets_and_losses(
    kd, calls, models, heads, config, keep, lattice
):
    models(heads)
    assert kd(stop_stage=5).returncode == 0
    rows = calls()
    (dump,) = command(rows, "dump")
    assert given(dump, "--keep") == keep
    assert ("--keep-lattice" in dump) == (lattice is not None)
    assert lattice is None or given(dump, "--keep-lattice") == lattice
    assert given(rows[-1], "--kd-config").endswith(f"/conf/{config}")
    assert f"/conf/{config}" in given(command(rows, "doctor")[-1], "--kd")


def test_a_config_of_the_users_own_goes_before_that_of_the_heads(
    kd, calls, models, tmp_path
):
    models(CTC)
    (tmp_path / "my.yaml").write_text("ctc-weight: 1\n")
    assert kd(stop_stage=5, kd_config="my.yaml").returncode == 0
    assert given(calls()[-1], "--kd-config") == str(tmp_path / "my.yaml")


def test_another_chunk_is_decoded_anew(kd, calls, models):
    models(f"{CTC} --causal True")
    assert kd(stop_stage=8).returncode == 0
    calls()
    assert kd(stage=8, stop_stage=8).returncode == 0
    assert not any("decode" in r[0] for r in calls())
    done = kd(stage=8, stop_stage=8, chunk_size=-1, left_context_frames=64)
    assert done.returncode == 0
    rows = [r for r in calls() if "decode" in r[0]]
    assert len(rows) == 3 and given(rows[0], "--chunk-size") == "-1"
    assert given(rows[0], "--left-context-frames") == "64"


def test_the_teachers_flags_are_read_once_for_each_teacher(kd, calls, place):
    (place / "zipformer" / "exp2").mkdir()
    assert kd(stop_stage=1).returncode == 0
    assert len(command(calls(), "doctor")) == 1
    assert kd(stage=2, stop_stage=2).returncode == 0
    assert command(calls(), "doctor") == []
    for changes in ({"teacher_epoch": 40}, {"teacher_exp_dir": "zipformer/exp2"}):
        assert kd(stage=2, stop_stage=2, **changes).returncode == 0
        assert len(command(calls(), "doctor")) == 1
    (place / "data" / "kd" / ".teacher").unlink()
    assert kd(stage=8, stop_stage=1).returncode == 0  # no stage
    assert calls() == []


def test_a_teacher_that_is_trained_again_is_read_again(kd, calls, place):
    assert kd(stop_stage=2).returncode == 0
    calls()
    (place / "zipformer" / "exp" / "epoch-30.pt").touch()
    assert kd(stage=2, stop_stage=2).returncode == 0
    assert len(command(calls(), "doctor")) == 1


def test_flags_of_parameters_alone_go_everywhere(kd, calls, models):
    models(f"{BOTH} --joiner-dim 9")
    done = kd(teacher_flags="--joiner-dim 9", **FINE)
    assert done.returncode == 0, done.stderr
    rows = calls()
    for name in ("doctor", "dump", "student"):
        assert all(given(r, "--joiner-dim") == "9" for r in command(rows, name))
    assert all(given(r, "--joiner-dim") == "9" for r in on(rows, "zipformer/exp"))


@pytest.mark.parametrize(
    "teacher, changes, words",
    [
        (BOTH, {"student": "s-streaming"}, 'give --student-flags "--init random"'),
        (BOTH, {"teacher_flags": "--chunk-size 16"}, "to kd.sh itself"),
        (BOTH, {"chunk_size": "16,32"}, "must be one number"),
        (BOTH, {"left_context_frames": ""}, "must be one number"),
        (CTC, {"decode": "decode.py:greedy_search"}, "has no such head"),
        (BOTH, {"decode": "decode_bbpe.py:greedy_search"}, "has no decode_bbpe.py"),
        (BOTH, {"export": "export-rknn.py"}, "has no export-rknn.py"),
        (BOTH, {"decode_flags": "--name 'a"}, "a quotation mark without"),
        (BOTH, {"tokens": "--bpe-model 'a"}, "a quotation mark without"),
        (BOTH, {"train_manifests": ""}, "--train-manifests is empty"),
        (BOTH, {"teacher_exp_dir": "zipformer/exp3"}, "has no folder zipformer/exp3"),
        (BOTH, {"python": "python3.99"}, "no such program"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_model_is_refused_before_training(
    kd, calls, models, teacher, changes, words
):
    models(teacher)
    done = kd(**changes)
    late = "decode_flags" in changes
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert late or not any(r[0] == "train.py" for r in calls())


def test_scripts_of_stages_that_are_not_asked_for_may_be_missing(kd, place):
    (place / "zipformer" / "export-onnx.py").unlink()
    (place / "data" / "fbank" / "test.jsonl.gz").unlink()
    assert kd(stop_stage=8).returncode == 0
    done = kd(stage=9)
    assert done.returncode == 1 and "has no test.jsonl.gz" in done.stderr
    done = kd(stage=9, export="export-onnx.py")
    assert done.returncode == 1 and "has no export-onnx.py" in done.stderr
    assert kd(stage=9, export="export.py").returncode == 0


def test_the_recipes_own_scripts_export_where_the_user_says_so(kd, calls):
    scripts = "icefall-kd export.py export-onnx-ctc.py"
    options = {"export": scripts, "export_flags": "--int8 'encoder,joiner'"}
    assert kd(**FINE, **options).returncode == 0
    rows = [r for r in on(calls(), "/kd") if "decode" not in r[0]]
    assert [r[0] for r in rows] == scripts.split()
    assert given(rows[0], "--int8") == "encoder,joiner"
    assert given(rows[1], "--jit") == "1" and "--jit" not in rows[2]
    for row in rows[1:]:  # which know nothing of distillation
        assert not any("kd-" in w.split("/")[0] for w in row)
        assert given(row, "--tokens") == "data/lang_bpe_500/tokens.txt"


@pytest.mark.parametrize(
    "script, words",
    [
        ("train.py", "give the same command again"),
        ("decode.py", "go on with --stage 8"),
        ("export-onnx.py", "export-onnx.py can't export"),
    ],
)
def test_a_script_that_fails_is_named_with_the_remedy(kd, place, script, words):
    assert kd(stop_stage=3).returncode == 0
    (place / "zipformer" / script).write_text("import sys; sys.exit(3)")
    plugged = place / "zipformer_kd" / script
    plugged.write_text("import sys; sys.exit(3)")
    done = kd(stage=4, export="export-onnx.py")
    assert done.returncode == 1
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_export_that_fails_goes_on_with_its_stage(kd, calls, tmp_path):
    assert kd(stop_stage=8).returncode == 0
    (tmp_path / "stop").touch()
    done = kd(stage=9)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "icefall-kd can't export" in done.stderr
    assert "go on with --stage 9" in done.stderr
    assert not any(r[1] == "report" for r in calls())
