"""``icefall-kd student``: presets, goals, what is kept, the account, all refusals."""

import json

import pytest
import torch
from lhotse import CutSet
from lhotse.dataset.collation import collate_features

from icefall_kd import build_student
from icefall_kd.cli.account import _numbers, account
from icefall_kd.errors import KDError
from icefall_kd.student.count import count_multiply_adds, count_parameters
from icefall_kd.student.cuts import read_batches
from icefall_kd.student.importance import select_important
from icefall_kd.student.presets import preset
from icefall_kd.student.scores import score_heads
from icefall_kd.student.search import nearest
from icefall_kd.student.selection import select_first
from icefall_kd.teacher.loader import load_recipe_model
from icefall_kd.teacher.recipe import flags_of, model_names
from icefall_kd.tokens import load_tokenizer

TEXTS = {"c1": "zero one", "c2": "seven", "c3": "two", "c4": "nine one"}
LENGTHS = {"c1": 47, "c2": 90, "c3": 61, "c4": 53}
NARROW = {
    "num_encoder_layers": "1,2",
    "encoder_dim": "8,12",
    "encoder_unmasked_dim": "8,8",
    "joiner_dim": 12,
}
SET = [
    word
    for name, value in NARROW.items()
    for word in ("--set", f"{name.replace('_', '-')}={value}")
]
FILES = ["epoch-1.pt", "student_account.txt", "student_flags"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "student"


@pytest.fixture
def student_words(folder, teacher_words):
    def words(*more):
        return ["student", *teacher_words, "--student-dir", folder, *more]

    return words


@pytest.fixture
def cuts(make_cut, tmp_path):
    path = tmp_path / "transcribed.jsonl.gz"
    made = [make_cut(i, n, text=TEXTS[i]) for i, n in LENGTHS.items()]
    CutSet.from_cuts(made).to_file(path)
    return path


@pytest.fixture
def cut_words(cuts, bpe_models):
    return ["--cuts", cuts, "--bpe-model", bpe_models.a]


@pytest.fixture
def made(folder, teacher_exp, recipe):
    """The student as the recipe's scripts load it; its flags give its settings."""

    def load():
        assert sorted(p.name for p in folder.iterdir()) == FILES
        model, settings = load_recipe_model(teacher_exp.recipe, folder, epoch=1)
        words = (folder / "student_flags").read_text().split()
        parsed = vars(recipe.get_parser().parse_args(words))
        names = model_names(recipe)
        assert {n: parsed[n] for n in names} == {n: settings[n] for n in names}
        return model, settings

    return load


@pytest.fixture
def batches(cuts, teacher_exp, bpe_models):
    sp = load_tokenizer(bpe_models.a)
    return read_batches(str(cuts), 64, teacher_exp.settings, sp)


def check_equal(model, other):
    a, b = model.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


# What a student starts from


@pytest.mark.parametrize(
    "layers, channels",
    [("even", "first"), ("important", "first"), ("important", "important")],
)
def test_the_student_is_what_the_library_builds(
    invoke,
    student_words,
    cut_words,
    made,
    teacher_exp,
    recipe,
    batches,
    layers,
    channels,
):
    words = student_words(*SET, *cut_words, "--layers", layers, "--channels", channels)
    done = invoke(*words)
    assert done.code == 0, done
    model, settings = made()
    old = teacher_exp.settings
    teacher = teacher_exp.models["epoch-2"]
    which = [word == "important" for word in (layers, channels)]
    kept = select_important(teacher, old, settings, batches, *which)
    if not any(which):
        kept = select_first(old, settings)
    expected, _ = build_student(teacher, old, NARROW, recipe.get_model, selection=kept)
    check_equal(model, expected)
    assert _numbers(kept.layers[1]) in done.out


def test_the_account_says_what_was_printed_and_how_both_begin(
    invoke, student_words, cut_words, made, teacher_exp, folder, batches, bpe_models
):
    done = invoke(*student_words(*SET, *cut_words))
    model, settings = made()
    text = (folder / "student_account.txt").read_text()
    assert done.out.startswith(text) and "before training, 4 cuts" in text
    flags = (folder / "student_flags").read_text().strip()
    last = done.out.splitlines()[-1].strip()
    assert last == f"--exp-dir {folder} --start-epoch 2 {flags}"

    sp, teacher = load_tokenizer(bpe_models.a), teacher_exp.models["epoch-2"]
    rows = {}
    for line in text.splitlines():
        rows[" ".join(w for w in line.split() if not w[0].isdigit())] = line.split()
    found = [score_heads(m, batches, sp) for m in (teacher, model)]
    for title, name, form in (
        ("CTC loss a token", "ctc_loss", ".3f"),
        ("CTC WER %", "ctc_wer", ".2f"),
        ("transducer loss a token", "transducer_loss", ".3f"),
        ("transducer WER %", "transducer_wer", ".2f"),
    ):
        assert rows[title][-2:] == [format(getattr(j, name), form) for j in found]
    for part in ("encoder_embed", "encoder", "decoder", "joiner", "ctc_output"):
        counts = [
            sum(p.numel() for p in getattr(m, part).parameters())
            for m in (teacher, model)
        ]
        assert rows[part][1:3] == [f"{n:,}" for n in counts]
    assert rows["all"][1:3] == [
        f"{sum(p.numel() for p in m.parameters()):,}" for m in (teacher, model)
    ]
    speeds = [
        count_multiply_adds(s)["all"] / 1e6 for s in (teacher_exp.settings, settings)
    ]
    assert rows["M multiply-adds/s"][2:4] == [f"{n:,.0f}" for n in speeds]


def test_fewer_cuts_are_asked_than_there_are(invoke, student_words, cut_words, folder):
    done = invoke(*student_words(*SET, *cut_words, "--num-cuts", 3))
    assert done.code == 0 and "before training, 3 cuts" in done.out


def test_without_cuts_the_account_has_no_rates(invoke, student_words, made):
    done = invoke(*student_words(*SET))
    assert done.code == 0 and "WER" not in done.out
    assert "hidden units: the first" in done.out
    made()


def test_a_random_student_is_judged_too(invoke, student_words, cut_words, made):
    done = invoke(*student_words(*SET, *cut_words, "--init", "random"))
    assert done.code == 0 and "kept of the teacher: nothing" in done.out
    assert "before training, 4 cuts" in done.out
    made()


def test_a_second_student_takes_the_place_of_the_first(invoke, student_words, made):
    assert invoke(*student_words(*SET)).code == 0
    assert invoke(*student_words("--set", "joiner-dim=8")).code == 0
    assert made()[0].joiner.output_linear.in_features == 8


# Sizes by name, by parameters, by speed


def test_a_preset_of_a_teacher_with_its_stacks(
    invoke, student_words, another_exp, made
):
    shape = preset("3m")
    exp, teacher = another_exp(**shape)
    done = invoke(*student_words("--exp-dir", exp, "--preset", "1m"))
    assert done.code == 0, done
    model, settings = made()
    assert {n: settings[n] for n in shape} == preset("1m")
    count = sum(p.numel() for p in model.parameters())
    assert count == count_parameters(settings)["all"]
    a, b = (m.ctc_output[1].weight for m in (model, teacher))
    assert torch.equal(a, b[:, :64])


def test_a_setting_changes_a_preset(invoke, student_words, another_exp, made):
    exp, _ = another_exp(**preset("3m"))
    words = ("--exp-dir", exp, "--preset", "1m", "--set", "joiner-dim=80")
    assert invoke(*student_words(*words)).code == 0
    _, settings = made()
    assert settings["joiner_dim"] == 80 and settings["decoder_dim"] == 64


@pytest.mark.parametrize("goal", ["--params", "--speed"])
def test_a_goal_is_met(invoke, student_words, made, teacher_exp, goal):
    old = teacher_exp.settings
    if goal == "--params":
        value = f"{count_parameters(old)['all'] * 0.9 / 1e3:.0f}k"
    else:
        value = "1.1x"
    done = invoke(*student_words(goal, value))
    assert done.code == 0, done
    model, settings = made()
    changes = nearest(value, old, old)
    assert changes and {n: settings[n] for n in changes} == changes
    if goal == "--params":
        count = sum(p.numel() for p in model.parameters()) / 1e3
        assert count == pytest.approx(float(value[:-1]), rel=0.05)
    else:
        a, b = (count_multiply_adds(s)["all"] for s in (old, settings))
        assert a / b == pytest.approx(1.1, rel=0.05)


# The front end


def test_a_narrower_front_end_is_built_counted_and_told(invoke, student_words, made):
    done = invoke(*student_words("--set", "embed-channels=8,16,32", *SET))
    assert done.code == 0, done
    model, settings = made()
    assert settings["embed_channels"] == "8,16,32"
    assert [len(model.encoder_embed.conv[i].bias) for i in (0, 4, 7)] == [8, 16, 32]
    count = count_parameters(settings)
    assert sum(p.numel() for p in model.parameters()) == count["all"]
    row = next(line for line in done.out.splitlines() if "front end" in line)
    assert row.split()[2:] == ["8,16,32", "of", "8,32,128"]
    assert "--embed-channels 8,16,32" in done.out.splitlines()[-1]


def test_a_student_that_keeps_the_front_end_says_nothing_of_it(invoke, student_words):
    done = invoke(*student_words(*SET))
    assert done.code == 0 and "front end" not in done.out
    assert "--embed-channels" not in done.out


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_a_teacher_from_before_the_option_has_icefalls_front_end(
    invoke, student_words, teacher_exp, made, tmp_path, init
):
    exp = tmp_path / "older"
    exp.mkdir()
    checkpoint = torch.load(teacher_exp.folder / "epoch-2.pt", weights_only=False)
    del checkpoint["embed_channels"]
    torch.save(checkpoint, exp / "epoch-2.pt")
    words = ("--exp-dir", exp, "--set", "embed-channels=4,16,32", "--init", init)
    done = invoke(*student_words(*words))
    assert done.code == 0, done
    assert made()[1]["embed_channels"] == "4,16,32"


def test_importance_chooses_the_front_ends_channels_too(
    invoke, student_words, cut_words, made, teacher_exp, recipe, batches
):
    changes = {"embed_channels": "4,11,20"}
    words = ("--set", "embed-channels=4,11,20", *cut_words, "--channels", "important")
    done = invoke(*student_words(*words))
    assert done.code == 0, done
    model, settings = made()
    old, teacher = teacher_exp.settings, teacher_exp.models["epoch-2"]
    kept = select_important(teacher, old, settings, batches, layers=False)
    expected, _ = build_student(teacher, old, changes, recipe.get_model, selection=kept)
    check_equal(model, expected)


# Teachers of all kinds


def test_a_teacher_of_parameters_alone(
    invoke, student_words, made, recipe, teacher_exp, bpe_models, tmp_path
):
    """As a released pretrained.pt: its flags stand on the command line."""
    model = teacher_exp.models["epoch-2"]
    torch.save({"model": model.state_dict()}, tmp_path / "epoch-9.pt")
    flags = flags_of(teacher_exp.settings, model_names(recipe)).split()
    words = ("--exp-dir", tmp_path, "--epoch", 9, "--bpe-model", bpe_models.a)
    done = invoke(*student_words(*words, *flags))
    assert done.code == 0, done
    check_equal(made()[0], model)


def test_parameters_alone_without_flags_are_refused(
    refused, student_words, teacher_exp, tmp_path
):
    state = teacher_exp.models["epoch-2"].state_dict()
    torch.save({"model": state}, tmp_path / "epoch-9.pt")
    words = student_words("--exp-dir", tmp_path, "--epoch", 9)
    assert "holds no model settings" in refused(*words)


def test_parameters_alone_with_other_symbols_are_refused(
    refused, student_words, recipe, teacher_exp, bpe_models, tmp_path
):
    model = teacher_exp.models["epoch-2"]
    torch.save({"model": model.state_dict()}, tmp_path / "epoch-9.pt")
    flags = flags_of(teacher_exp.settings, model_names(recipe)).split()
    words = ("--exp-dir", tmp_path, "--epoch", 9, "--bpe-model", bpe_models.larger)
    error = refused(*student_words(*words, *flags))
    assert f"--bpe-model {bpe_models.larger} has 26 tokens" in error
    assert "are for 25" in error


@pytest.mark.parametrize("more", [("--epoch", 2), ("--iter", 20, "--avg", 2)])
def test_an_averaged_teacher(invoke, student_words, made, teacher_exp, more):
    assert invoke(*student_words(*more, "--use-averaged-model", 1)).code == 0
    given = dict(zip(more[::2], more[1::2], strict=True))
    expected, _ = load_recipe_model(
        teacher_exp.recipe,
        teacher_exp.folder,
        epoch=given.get("--epoch", 0),
        iteration=given.get("--iter", 0),
        avg=given.get("--avg", 1),
        use_averaged_model=True,
    )
    check_equal(made()[0], expected)
    single = teacher_exp.models["epoch-2"].state_dict()
    assert not torch.equal(
        expected.state_dict()["ctc_output.1.weight"], single["ctc_output.1.weight"]
    )


def test_a_first_epoch_shorter_than_the_teachers_average_period_is_averaged(
    invoke, student_words, folder, teacher_exp
):
    assert teacher_exp.settings.average_period == 10
    assert invoke(*student_words(*SET)).code == 0
    states = torch.load(folder / "epoch-1.pt", weights_only=False)
    average = {k: v.double() + 1 for k, v in states["model"].items()}
    states.update(batch_idx_train=5, average_period=2, model_avg=average)
    torch.save(states, folder / "epoch-2.pt")
    model, _ = load_recipe_model(
        teacher_exp.recipe, folder, epoch=2, use_averaged_model=True
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, average[name].to(value.dtype)), name


@pytest.mark.parametrize(
    "shape",
    [
        {"causal": True, "chunk_size": "4,-1", "left_context_frames": "16,-1"},
        {"use_transducer": False},
        {"use_ctc": False},
        {"context_size": 1},
    ],
    ids="causal ctc transducer bigram".split(),
)
def test_flags_and_importance_of_other_teachers(
    invoke, student_words, cut_words, another_exp, made, shape
):
    exp, _ = another_exp(**shape)
    words = (*SET, "--layers", "important", "--channels", "important", *cut_words)
    done = invoke(*student_words("--exp-dir", exp, *words))
    assert done.code == 0, done
    _, settings = made()
    assert {n: settings[n] for n in shape} == shape
    assert ("CTC WER" in done.out) == shape.get("use_ctc", True)
    assert ("transducer WER" in done.out) == shape.get("use_transducer", True)


def test_a_list_with_spaces_is_one_word_of_the_flags(invoke, student_words, folder):
    words = ("--set", "encoder-dim=8, 12", "--set", "encoder-unmasked-dim=8,8")
    assert invoke(*student_words(*words)).code == 0
    words = (folder / "student_flags").read_text().split()
    assert words[words.index("--encoder-dim") + 1] == "8,12"


@pytest.mark.parametrize("chunks", ["-1,8", "-1", "8,-1"])
def test_chunks_of_whole_utterances_come_through_the_flags(
    invoke, student_words, another_exp, made, chunks
):
    exp, _ = another_exp(causal=True)
    words = ("--exp-dir", exp, "--set", f"chunk-size={chunks}")
    assert invoke(*student_words(*words)).code == 0
    assert made()[1]["chunk_size"] == chunks


# Refusals


@pytest.mark.parametrize(
    "more, words",
    [
        (("--preset", "s"), "downsampling_factor is 1,2,4,8,4,2 and its teacher's 1,2"),
        (("--preset", "s"), "give --params or --speed in place of --preset"),
        (("--preset", "xs"), "no preset 'xs'"),
        (("--preset", "1m-streaming"), "keeps it"),
        (("--params", "5M", "--speed", "3x"), "--params 5M and --speed 3x are given"),
        (("--preset", "s", "--params", "5M"), "--preset s and --params 5M are given"),
        (("--params", "3x"), "--params is 3x, and takes a value as 5M"),
        (("--speed", "5M"), "--speed is 5M, and takes a value as 3x"),
        (("--params", "much"), "'much' is no goal"),
        (("--params", "900M"), "the largest has"),
        (("--speed", "1000x"), "the fastest is"),
        (("--layers", "important"), "give --cuts"),
        (("--channels", "important"), "give --cuts"),
        (("--init", "random", "--channels", "important"), "leave out one of them"),
        (("--init", "random", "--layers", "important"), "leave out one of them"),
        (("--set", "decoder-dim=10"), "decoder_dim is 10"),
        (("--set", "encoder-dim=16,11"), "encoder_unmasked_dim is 8,12"),
        (("--set", "causal=1"), "causal is True and its teacher's False"),
        (("--set", "encoder-dim=8,8,8"), "encoder_dim has 3 numbers"),
        (("--set", "embed-channels=8,16"), "embed_channels is '8,16', and must be thr"),
        (("--set", "embed-channels=0,16,32"), "embed_channels is '0,16,32', and must"),
        (("--set", "embed-channels=8,16,x"), "embed_channels is '8,16,x', and must be"),
        (("--set", "embed-channels=9,32,128"), "embed_channels is 9,32,128 and its te"),
        (
            ("--set", "embed-channels=8,16", "--init", "random"),
            "embed_channels is '8,16', and must be three numbers",
        ),
        (
            ("--set", "embed-channels=8,32,999999", "--init", "random"),
            "are built: give smaller numbers",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(refused, student_words, more, words):
    assert words in refused(*student_words(*more))


def test_cuts_without_a_bpe_model_are_refused(refused, student_words, cuts):
    assert "give --bpe-model" in refused(*student_words("--cuts", cuts))


@pytest.mark.parametrize("n", [0, -3])
def test_no_cuts_at_all_are_refused(refused, student_words, cut_words, n):
    error = refused(*student_words(*cut_words, "--num-cuts", n))
    assert f"--num-cuts is {n}, and must be a whole number from 1" in error


def test_a_missing_manifest_is_refused(refused, student_words, cut_words, tmp_path):
    words = (*cut_words, "--cuts", tmp_path / "none.jsonl.gz")
    assert "none.jsonl.gz does not exist" in refused(*student_words(*words))


@pytest.mark.parametrize("important", [(), ("--channels", "important")])
@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(num_frames=47, text=None), "the cut bad has no transcript"),
        (dict(num_frames=47, text=" "), "the measure of a student needs one"),
        (dict(num_frames=47, num_features=19), "teacher takes 20"),
        (dict(num_frames=8), "the teacher needs 9"),
        (dict(num_frames=15, text="one " * 9), "as many frames"),
    ],
    ids="no-text blank features short labels".split(),
)
def test_cuts_that_cannot_be_used_are_refused(
    refused, student_words, cut_words, make_cut, tmp_path, bad, words, important
):
    path = tmp_path / "bad.jsonl"
    good = make_cut("good", 47, text="zero")
    CutSet.from_cuts([good, make_cut("bad", **{"text": "one", **bad})]).to_file(path)
    error = refused(*student_words(*cut_words, *important, "--cuts", path))
    assert words in error and "--keep-lattice" not in error


@pytest.mark.parametrize("count", [0, 2])
def test_cuts_of_no_supervision_or_two_are_refused(
    refused, student_words, cut_words, make_cut, tmp_path, count
):
    bad = make_cut("bad", 47, text="one")
    bad.supervisions = count * bad.supervisions
    CutSet.from_cuts([bad]).to_file(tmp_path / "bad.jsonl")
    error = refused(*student_words(*cut_words, "--cuts", tmp_path / "bad.jsonl"))
    assert f"the cut bad has {count} supervisions" in error


@pytest.mark.parametrize("what", ["score_heads", "select_important"])
def test_where_memory_runs_out_the_batches_are_named(
    invoke, student_words, cut_words, folder, monkeypatch, what
):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(f"icefall_kd.cli.student.{what}", full)
    words = (*SET, *cut_words, "--layers", "important")
    done = invoke(*student_words(*words))
    assert done.code == 1 and not folder.exists()
    assert "a pass over 8 cuts of --cuts of up to 90 feature frames" in done.err[-1]


def test_a_student_does_not_stand_beside_its_teachers_checkpoints(
    refused, student_words, teacher_exp, tmp_path
):
    """Even where no file of theirs would be replaced."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "epoch-2.pt").write_bytes((teacher_exp.folder / "epoch-2.pt").read_bytes())
    words = student_words("--exp-dir", alone, "--student-dir", f"{alone}/../alone")
    assert "--student-dir and --exp-dir are both" in refused(*words)


def test_a_student_dir_that_is_a_file_is_refused(refused, student_words, cuts):
    assert "is a file" in refused(*student_words("--student-dir", cuts))
    assert "is a file" in refused(*student_words("--student-dir", f"{cuts}/student"))


def test_features_that_are_gone_are_refused(
    refused, student_words, cut_words, make_cut, tmp_path
):
    cut = make_cut("gone", 47, text="zero")
    CutSet.from_cuts([cut]).to_file(tmp_path / "gone.jsonl")
    next((tmp_path / "feats").rglob("gone*")).unlink()
    words = (*cut_words, "--cuts", tmp_path / "gone.jsonl")
    assert "features of cut gone can't be read" in refused(*student_words(*words))


def test_cuts_behind_those_asked_for_are_not_looked_at(
    invoke, student_words, cut_words, make_cut, tmp_path
):
    path = tmp_path / "two.jsonl"
    cuts = [make_cut("good", 47, text="zero"), make_cut("bad", 47, text=None)]
    CutSet.from_cuts(cuts).to_file(path)
    words = (*cut_words, "--cuts", path, "--num-cuts", 1)
    assert invoke(*student_words(*words)).code == 0


def test_another_trainings_checkpoint_is_not_written_over(
    refused, student_words, teacher_exp, tmp_path, tree_of
):
    """Such as the teacher's own epoch-1.pt."""
    before = tree_of(teacher_exp.folder)
    error = refused(*student_words("--student-dir", teacher_exp.folder))
    assert "another training" in error and "--student-dir" in error
    assert tree_of(teacher_exp.folder) == before


@pytest.mark.parametrize("name", ["--recipe", "--exp-dir", "--student-dir"])
def test_a_student_needs_a_teacher_and_a_place(invoke, student_words, name):
    words = student_words()
    at = words.index(name)
    done = invoke(*words[:at], *words[at + 2 :])
    assert done.code == 2 and f"Missing option '{name}'" in done.err[-1]
    assert "Traceback" not in "".join(done.err)


def test_a_start_that_there_is_not_is_refused(invoke, student_words, folder):
    done = invoke(*student_words("--init", "zeros"))
    assert done.code == 2 and "'zeros' is not one of" in done.err[-1]
    assert not folder.exists()


def test_an_older_zipformer_is_refused(
    refused, student_words, teacher_exp, tmp_path, monkeypatch, recipe
):
    """A recipe whose encoder has other layers than icefall's zipformer."""
    exp = tmp_path / "older"
    exp.mkdir()
    path = exp / "epoch-2.pt"
    checkpoint = torch.load(teacher_exp.folder / path.name, weights_only=False)
    state = checkpoint["model"]
    checkpoint["model"] = {k: v for k, v in state.items() if "nonlin" not in k}
    torch.save(checkpoint, path)
    get_model = recipe.get_model

    def older(params):
        model = get_model(params)
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith(".nonlin_attention"):
                owner, _, leaf = name.rpartition(".")
                delattr(model.get_submodule(owner), leaf)
        return model

    monkeypatch.setattr(recipe, "get_model", older)
    error = refused(*student_words("--exp-dir", exp, *SET))
    assert "is a Zipformer without the layers of icefall's zipformer" in error


def test_a_recipe_without_model_options_is_refused(recipe, monkeypatch):
    monkeypatch.delattr(recipe, "add_model_arguments")
    with pytest.raises(KDError, match="no function add_model_arguments"):
        model_names(recipe)


# The list of presets needs no teacher


@pytest.mark.parametrize("option", ["--list", "--json"])
def test_presets_are_listed_without_a_teacher(invoke, folder, option):
    done = invoke("student", option)
    assert done.code == 0 and done.err == []
    if option == "--json":
        assert {"s", "m", "l", "xl", "kws", "1m-streaming"} <= set(json.loads(done.out))
    else:
        assert "kws-streaming" in done.out


# Parts


def test_cuts_are_heard_in_batches_of_their_own_features(
    cuts, teacher_exp, bpe_models, make_cut, tmp_path
):
    path = tmp_path / "ten.jsonl"
    made = [make_cut(f"c{i}", 40 + i, text="seven") for i in range(10)]
    CutSet.from_cuts(made).to_file(path)
    sp = load_tokenizer(bpe_models.a)
    batches = read_batches(str(path), 64, teacher_exp.settings, sp)
    assert [len(x) for x, _, _ in batches] == [8, 2]
    for (x, x_lens, y), some in zip(batches, (made[:8], made[8:]), strict=True):
        expected, lens = collate_features(CutSet.from_cuts(some))
        assert torch.equal(x, expected) and torch.equal(x_lens, lens)
        assert y == [sp.encode("seven")] * len(some)


@pytest.mark.parametrize(
    "indices, text",
    [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([1, 3, 4, 9, 10], "1,3-4,9-10")],
)
def test_numbers_are_shown_as_ranges(indices, text):
    assert _numbers(indices) == text


def test_an_account_of_a_model_that_nobody_counts_has_no_speed(
    make_model, make_settings
):
    model, settings = make_model(), make_settings(use_adapters=True)
    text = account(model, model, settings, settings, None, [], 0)
    assert "multiply-adds" not in text and "encoder_embed" in text
    assert "multiply-adds" in account(
        model, model, make_settings(), make_settings(), None, [], 0
    )


def test_the_flags_are_of_the_model_and_not_of_the_way_it_was_trained():
    """A teacher trained with CR-CTC has use_cr_ctc among its model's options."""
    import argparse
    from types import SimpleNamespace

    def add_model_arguments(parser):
        parser.add_argument("--encoder-dim", default="8")
        parser.add_argument("--use-cr-ctc", type=bool, default=False)

    def get_parser():
        parser = argparse.ArgumentParser()
        parser.add_argument("--context-size", type=int, default=2)
        add_model_arguments(parser)
        return parser

    train = SimpleNamespace(
        __file__="train.py",
        add_model_arguments=add_model_arguments,
        get_parser=get_parser,
    )
    names = model_names(train)
    assert names == {"encoder_dim": "8", "context_size": 2}
    settings = {"encoder_dim": "4", "context_size": 1, "use_cr_ctc": True}
    assert flags_of(settings, names) == "--encoder-dim 4 --context-size 1"
