"""``icefall-kd doctor`` beside a teacher: what fits, and what is refused."""

import pytest
import torch
from lhotse import CutSet


@pytest.fixture
def doctor(invoke, teacher_words, teacher_exp):
    def run(*more, words=(*teacher_words, "--bpe-model", teacher_exp.bpe_model)):
        return invoke("doctor", *words, *more)

    return run


@pytest.fixture
def dumped(invoke, dump_words, tmp_path, teacher_exp):
    out = tmp_path / "with-targets.jsonl.gz"
    assert invoke(*dump_words("--bpe-model", teacher_exp.bpe_model, out=out)).code == 0
    return out


@pytest.fixture
def student_dir(invoke, teacher_words, tmp_path):
    folder = tmp_path / "student"
    words = ("--student-dir", folder, "--set", "joiner-dim=12")
    assert invoke("student", *teacher_words, *words).code == 0
    return folder


def rows(done):
    return {line.split()[0]: line for line in done.out.splitlines() if line.strip()}


def refusal(done):
    assert done.code == 1 and "fit together" not in done.out
    (line,) = done.err
    assert line.startswith("icefall_kd: error: ")
    return line


def test_all_that_fits_is_said(doctor, in_cuts, student_dir):
    done = doctor("--cuts", in_cuts, "--student-dir", student_dir)
    assert done.code == 0 and done.err == []
    found = rows(done)
    assert "CTC and transducer, 25 tokens" in found["teacher"]
    assert "25 in" in found["tokens"]
    assert f"4 in {in_cuts}, 80 features" in found["cuts"] or "4 in" in found["cuts"]
    assert "its flags fit it" in found["student"] and "targets" not in found
    assert done.out.splitlines()[-1] == "These fit together."


def test_targets_of_this_teacher_fit(doctor, dumped):
    done = doctor("--cuts", dumped)
    assert done.code == 0 and "CTC dense, of this teacher" in rows(done)["targets"]


def test_targets_that_were_moved_with_their_manifest_fit(
    doctor, invoke, dumped, tmp_path, monkeypatch
):
    """Read by a relative path from another working folder; so does the report."""
    new = tmp_path / "elsewhere" / "kd"
    new.mkdir(parents=True)
    store = tmp_path / "with-targets_kd"
    for place in (dumped, store):
        place.rename(new / place.name)
    monkeypatch.chdir(new.parent)
    done = doctor("--cuts", "kd/with-targets.jsonl.gz")
    assert done.code == 0 and "in kd/with-targets_kd" in rows(done)["targets"]
    (new / store.name).rename(new / "renamed")
    error = refusal(doctor("--cuts", "kd/with-targets.jsonl.gz"))
    assert f"{store} has no fingerprint.json" in error
    assert "`icefall-kd repoint CUTS --storage-dir FOLDER`" in error
    words = ("repoint", "kd/with-targets.jsonl.gz", "--storage-dir", "kd/renamed")
    assert invoke(*words).code == 0
    assert doctor("--cuts", "kd/with-targets.jsonl.gz").code == 0


def test_targets_of_another_teacher_are_refused(doctor, dumped, teacher_exp):
    other = [
        *("--recipe", teacher_exp.recipe, "--exp-dir", teacher_exp.folder),
        *("--epoch", 1, "--use-averaged-model", 0),
    ]
    said = refusal(doctor("--cuts", dumped, words=other))
    assert "are of the teacher" in said and "dump them again" in said


def test_targets_of_other_tokens_are_refused(doctor, dumped, teacher_words, bpe_models):
    words = [*teacher_words, "--bpe-model", bpe_models.b]
    assert "tokens (hash" in refusal(doctor("--cuts", dumped, words=words))


def test_tokens_of_another_size_are_refused(doctor, teacher_words, tmp_path):
    (tmp_path / "tokens.txt").write_text("<blk> 0\n<unk> 1\n")
    said = refusal(doctor(words=[*teacher_words, "--lang-dir", tmp_path]))
    assert "has 2 tokens and the teacher 25" in said


def test_cuts_that_the_teacher_can_not_hear_are_refused(doctor, make_cut, tmp_path):
    path = tmp_path / "short.jsonl.gz"
    CutSet.from_cuts([make_cut("c1", 5)]).to_file(path)
    assert "the cut c1" in refusal(doctor("--cuts", path))


@pytest.mark.parametrize("name", ["epoch-1.pt", "student_flags"])
def test_a_folder_that_is_no_student_is_refused(doctor, student_dir, name):
    (student_dir / name).unlink()
    assert f"has no {name}" in refusal(doctor("--student-dir", student_dir))


def test_flags_that_the_students_checkpoint_contradicts_are_refused(
    doctor, student_dir
):
    flags = student_dir / "student_flags"
    flags.write_text(flags.read_text().replace("--joiner-dim 12", "--joiner-dim 16"))
    said = refusal(doctor("--student-dir", student_dir))
    assert "--joiner-dim is 16" in said and "trained with 12" in said


def test_a_student_of_other_symbols_is_refused(doctor, student_dir):
    path = student_dir / "epoch-1.pt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["vocab_size"] = 24
    torch.save(checkpoint, path)
    said = refusal(doctor("--student-dir", student_dir))
    assert "vocab_size" in said and "24" in said and "25" in said


@pytest.mark.parametrize("word", ["--cuts", "--student-dir"])
def test_what_is_looked_at_beside_a_teacher_needs_one(doctor, tmp_path, word):
    assert "give --recipe and --exp-dir" in refusal(doctor(word, tmp_path, words=()))


def test_a_loss_that_the_targets_serve_is_told(doctor, dumped, tmp_path):
    config = tmp_path / "kd.yaml"
    config.write_text("ctc-weight: 0.75\n")
    done = doctor("--cuts", dumped, "--kd", f"--kd-config {config} --kd-temperature 2")
    assert done.code == 0 and done.err == []
    assert "0.75 * kd_ctc_loss, temperature 2.0" in rows(done)["loss"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--kd-rnnt-weight 1", "keeps no lattices"),
        ("--kd-hidden-weight 1 --kd-hidden-layers out", "keeps no hidden layers"),
        ("--kd-ctc-weigth 1", "no option of distillation"),
        ("--kd-ctc-weight -1", "--kd-ctc-weight"),
        ("--kd-config none.yaml", "none.yaml, can't be read"),
        ("--kd-temperature 2", "gives no term a weight"),
    ],
)
def test_a_loss_that_the_targets_can_not_serve_is_refused(doctor, dumped, words, said):
    assert said in refusal(doctor("--cuts", dumped, "--kd", words))


def test_a_loss_needs_cuts_with_targets(doctor, in_cuts):
    done = doctor("--cuts", in_cuts, "--kd", "--kd-ctc-weight 1")
    assert "have no targets" in refusal(done)


def test_cuts_that_a_dump_left_out_are_counted(
    doctor, invoke, dump_words, make_cut, tmp_path, teacher_exp, caplog
):
    cuts = [make_cut("bad", 5), *(make_cut(f"c{i}", 47) for i in range(20))]
    path, out = tmp_path / "given.jsonl.gz", tmp_path / "targets.jsonl.gz"
    CutSet.from_cuts(cuts).to_file(path)
    words = dump_words("--bpe-model", teacher_exp.bpe_model, cuts=path, out=out)
    assert invoke(*words).code == 0
    assert "1 cuts of the manifest go without targets" in refusal(
        doctor("--cuts", out, "--kd", "--kd-ctc-weight 1")
    )
    caplog.clear()
    done = doctor("--cuts", out, "--kd", "--kd-ctc-weight 1 --kd-missing hard")
    assert done.code == 0, done
    assert "of this teacher" in rows(done)["targets"]
    assert "1 cuts go without targets: train with --kd-missing hard" in done.out
    assert "1 of 21 cuts can't be used and are left out: the cut bad" in caplog.text


@pytest.mark.parametrize("count", [0, 2])
def test_a_cut_of_no_supervision_or_two_does_not_fit(doctor, make_cut, tmp_path, count):
    bad = make_cut("bad", 61)
    bad.supervisions = count * bad.supervisions
    path = tmp_path / "given.jsonl.gz"
    CutSet.from_cuts([make_cut("a", 61), bad]).to_file(path)
    said = refusal(doctor("--cuts", path))
    assert f"the cut bad has {count} supervisions" in said


def test_cuts_longer_than_their_supervisions_are_told(
    doctor, make_cut, tmp_path, caplog
):
    long = make_cut("long", 150)
    long.supervisions[0].duration = 1.0
    path = tmp_path / "given.jsonl.gz"
    CutSet.from_cuts([make_cut("a", 61), long]).to_file(path)
    assert doctor("--cuts", path).code == 0
    assert "1 of 2 cuts are longer than their supervision, long the first" in (
        caplog.text
    )


def test_the_teachers_flags_are_written_as_its_decode_py_needs_them(
    doctor, tmp_path, teacher_exp, recipe
):
    path = tmp_path / "flags"
    assert doctor("--write-flags", path).code == 0
    args = recipe.get_parser().parse_args(path.read_text().split())
    for name in ("encoder_dim", "joiner_dim", "causal", "use_ctc", "context_size"):
        assert getattr(args, name) == teacher_exp.settings[name]


def test_heads_and_chunks_of_a_causal_teacher_are_among_its_flags(
    invoke, teacher_exp, another_exp, tmp_path
):
    settings = {"causal": True, "chunk_size": "4,-1", "left_context_frames": "8"}
    folder, _ = another_exp(seed=3, use_transducer=False, **settings)
    words = ["--recipe", teacher_exp.recipe, "--exp-dir", folder, "--epoch", 2]
    words += ["--use-averaged-model", 0]
    path = tmp_path / "flags"
    assert invoke("doctor", *words, "--write-flags", path).code == 0
    flags = path.read_text().split()
    for option, value in (
        ("--causal", "True"),
        ("--use-transducer", "False"),
        ("--chunk-size", "4,-1"),
    ):
        assert flags[flags.index(option) + 1] == value
    chunks = ("--chunk-size", "-1", "--left-context-frames", "-1")
    assert invoke("doctor", *words, "--write-flags", path, *chunks).code == 0
    assert "--chunk-size=-1 --left-context-frames=-1" in path.read_text()


def test_flags_that_can_not_be_written_are_refused(doctor, tmp_path):
    said = refusal(doctor("--write-flags", tmp_path / "none" / "flags"))
    assert "can't be written" in said
    assert list(tmp_path.iterdir()) == []


def test_flags_are_of_a_teacher(doctor, tmp_path):
    said = refusal(doctor("--write-flags", tmp_path / "flags", words=()))
    assert "give --recipe and --exp-dir" in said


def test_targets_of_several_chunks_are_known_as_this_teachers(
    invoke, teacher_exp, another_exp, in_cuts, tmp_path
):
    """Its name in the fingerprint has commas, as those of several teachers have."""
    settings = {"causal": True, "chunk_size": "4,-1", "left_context_frames": "8,-1"}
    folder, _ = another_exp(seed=3, **settings)
    words = ["--recipe", teacher_exp.recipe, "--exp-dir", folder, "--epoch", 2]
    words += ["--use-averaged-model", 0]
    out = tmp_path / "causal.jsonl.gz"
    assert invoke("dump", in_cuts, out, *words, "--num-threads", 1).code == 0
    assert invoke("doctor", *words, "--cuts", out).code == 0
    said = refusal(invoke("doctor", *words, "--cuts", out, "--chunk-size", "4"))
    assert "dump them again" in said


@pytest.mark.parametrize(
    "weights", [(), ("--teacher-weights", "2,1")], ids=["same", "weights"]
)
def test_targets_of_several_teachers_are_known_as_each_ones(
    invoke, teacher_exp, another_exp, in_cuts, tmp_path, weights
):
    folder, _ = another_exp()
    usual = ["--recipe", teacher_exp.recipe, "--epoch", 2, "--use-averaged-model", 0]
    both = ["--exp-dir", f"{teacher_exp.folder},{folder}"]
    out = tmp_path / "both.jsonl.gz"
    words = [*usual, *both, *weights, "--num-threads", 1]
    assert invoke("dump", in_cuts, out, *words).code == 0
    for one in (teacher_exp.folder, folder):
        assert invoke("doctor", *usual, "--exp-dir", one, "--cuts", out).code == 0
    other, _ = another_exp(seed=8)
    done = invoke("doctor", *usual, "--exp-dir", other, "--cuts", out)
    assert "dump them again" in refusal(done)


@pytest.mark.parametrize("words", ["--kd-config 'x", '"', "--kd-ctc-weight '1"])
def test_a_quotation_that_is_not_closed_is_refused(doctor, dumped, words):
    said = refusal(doctor("--cuts", dumped, "--kd", words))
    assert "No closing quotation" in said and "close its quotation" in said


def test_help_among_the_options_of_distillation_is_none(doctor, dumped):
    said = refusal(doctor("--cuts", dumped, "--kd", "--help"))
    assert "no option of distillation" in said


def test_an_option_that_nobody_knows_is_refused(doctor, in_cuts):
    said = refusal(doctor("--cuts", in_cuts, "--nonsense", 3))
    assert "--nonsense is an option neither of this command nor of" in said


@pytest.mark.parametrize(
    "words",
    [("--nonsense",), ("--kd", "--kd-ctc-weight 1"), ("--recipe", "x"), ("--", "-h")],
)
def test_nothing_is_asked_without_a_teacher(doctor, words):
    assert "give --recipe and --exp-dir" in refusal(doctor(*words, words=()))


@pytest.mark.parametrize(
    "flags, words",
    [
        (b"", "lacks --"),
        (b"\n", "lacks --"),
        (b"\xff\xfe--joiner-dim 12", "is not in UTF-8"),
    ],
    ids=["empty", "blank", "bytes"],
)
def test_flags_that_are_not_whole_are_refused(doctor, student_dir, flags, words):
    path = student_dir / "student_flags"
    path.write_bytes(flags)
    said = refusal(doctor("--student-dir", student_dir))
    assert str(path) in said and words in said


def test_flags_that_were_cut_short_are_refused(doctor, student_dir):
    path = student_dir / "student_flags"
    words = path.read_text().split()
    path.write_text(" ".join(words[:-2]))
    said = refusal(doctor("--student-dir", student_dir))
    assert f"lacks {words[-2]} {words[-1]}" in said
