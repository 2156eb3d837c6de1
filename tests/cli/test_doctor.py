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
    assert "CTC and transducer, 25 symbols" in found["teacher"]
    assert "25 in" in found["tokens"]
    assert f"4 in {in_cuts}, 80 features" in found["cuts"] or "4 in" in found["cuts"]
    assert "its flags fit it" in found["student"] and "targets" not in found
    assert done.out.splitlines()[-1] == "These fit together."


def test_targets_of_this_teacher_fit(doctor, dumped):
    done = doctor("--cuts", dumped)
    assert done.code == 0 and "CTC dense, of this teacher" in rows(done)["targets"]


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
    assert "has 2 symbols and the teacher 25" in said


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
        ("--kd-hidden-weight 1 --kd-hidden-layers out", "keeps the layers none"),
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
