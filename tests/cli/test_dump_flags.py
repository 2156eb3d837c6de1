"""The model's flags: for parameters alone, for chunks, and what contradicts them."""

import shlex
import shutil

import pytest
import sentencepiece as spm
import torch
from lhotse import load_manifest

from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint
from icefall_kd.targets.fingerprint import hash_state_dict
from icefall_kd.targets.store import Pointer
from icefall_kd.teacher.recipe import params_of_flags
from icefall_kd.teacher.teacher import Teacher
from icefall_kd.training.online import online_teacher
from icefall_kd.training.options import all_options

pytestmark = pytest.mark.usefixtures("loaded_once")

# In which the recipe's defaults are not the teacher's.
SHAPES = (
    "feature-dim num-encoder-layers downsampling-factor feedforward-dim num-heads "
    "encoder-dim query-head-dim value-head-dim pos-dim cnn-module-kernel decoder-dim "
    "joiner-dim"
).split()
CHUNKS = {"causal": True, "chunk_size": "16", "left_context_frames": "32"}


@pytest.fixture
def flags(teacher_exp):
    """The teacher's flags as words, some left out."""

    def words(*without):
        names = [n for n in (*SHAPES, "encoder-unmasked-dim") if n not in without]
        values = [teacher_exp.settings[n.replace("-", "_")] for n in names]
        return [w for n, v in zip(names, values) for w in (f"--{n}", v)]

    return words


@pytest.fixture
def bare_exp(teacher_exp, tmp_path):
    """The teacher's parameters alone, as a released pretrained.pt has them."""
    folder = tmp_path / "released"
    folder.mkdir()
    state = teacher_exp.models["epoch-2"].state_dict()
    torch.save({"model": state}, folder / "pretrained.pt")
    (folder / "epoch-99.pt").symlink_to("pretrained.pt")
    return folder


@pytest.fixture
def bare_words(dump_words, bare_exp, bpe_models):
    def words(*more, bpe_model=bpe_models.a, **options):
        which = ("--exp-dir", bare_exp, "--epoch", 99)
        bpe = ("--bpe-model", bpe_model) if bpe_model else ()
        return dump_words(*which, *bpe, *more, **options)

    return words


def records(path):
    """The parts of each cut's record, and the fingerprint they were made under."""
    cuts = list(load_manifest(path))
    pointers = {c.id: Pointer.of_cut(c) for c in cuts}
    assert len(pointers) == 4
    digests = {p.fingerprint for p in pointers.values()}
    return {i: p.read() for i, p in pointers.items()}, digests


# Parameters alone


def test_parameters_alone_give_the_targets_of_the_whole_checkpoint(
    invoke, dump_words, bare_words, bpe_models, flags, tmp_path
):
    whole = tmp_path / "whole.jsonl.gz"
    kept = ("--keep-lattice", "collapsed", "--keep-hidden", "1:half")
    words = dump_words("--bpe-model", bpe_models.a, *kept, out=whole)
    assert invoke(*words).code == 0
    assert invoke(*bare_words(*kept, *flags())).code == 0
    assert records(tmp_path / "out.jsonl.gz") == records(whole)
    found = Fingerprint.read(tmp_path / "out_kd")
    assert found == Fingerprint.read(tmp_path / "whole_kd") and found.tokens


def test_flags_may_stand_among_the_commands_options(
    invoke, bare_words, flags, tmp_path
):
    names, values = flags()[::2], flags()[1::2]
    joined = [f"{n}={v}" for n, v in zip(names, values)]
    words = bare_words(*joined[:5], "--keep", "top:3", *joined[5:], "--stats")
    done = invoke(*words)
    assert done.code == 0 and "top:3" in done.out
    assert Fingerprint.read(tmp_path / "out_kd").ctc == "top:3"


def test_parameters_alone_need_the_bpe_model(refused, bare_words, flags):
    error = refused(*bare_words(*flags(), bpe_model=None))
    assert "epoch-99.pt holds no model settings" in error
    assert "give --bpe-model and the model's flags" in error


def test_parameters_alone_need_flags(refused, bare_words):
    error = refused(*bare_words())
    assert "epoch-99.pt are not those of the model" in error
    assert "for parameters alone the model's flags" in error


@pytest.mark.parametrize("name", SHAPES)
def test_a_flag_that_is_missing_is_refused(
    refused, bare_words, flags, teacher_exp, name
):
    error = refused(*bare_words(*flags(name)))
    number = isinstance(teacher_exp.settings[name.replace("-", "_")], int)
    if number or name.endswith("head-dim"):
        assert "epoch-99.pt are not those of the model" in error
        assert "size mismatch" in error
    else:  # as many numbers as the recipe's own model has stacks
        assert "can't build the model of" in error and "AssertionError" in error


def test_parameters_alone_are_not_averaged(refused, bare_exp, bare_words, flags):
    shutil.copy(bare_exp / "epoch-99.pt", bare_exp / "epoch-98.pt")
    words = bare_words(*flags(), "--use-averaged-model", 1)
    error = refused(*words)
    assert "holds no model_avg" in error and "--use-averaged-model 0" in error


def test_two_files_of_parameters_alone_are_averaged(
    invoke, bare_exp, bare_words, flags, teacher_exp, tmp_path
):
    """Both are of one model here, so that the mean is that model."""
    shutil.copy(bare_exp / "epoch-99.pt", bare_exp / "epoch-98.pt")
    assert invoke(*bare_words(*flags(), "--avg", 2)).code == 0
    expected = hash_state_dict(teacher_exp.models["epoch-2"].state_dict())
    assert Fingerprint.read(tmp_path / "out_kd").teacher == expected


@pytest.fixture
def bpe_of(tmp_path):
    """A BPE model of 25 pieces, the first two of them as told."""

    def make(*symbols):
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(["zero one two three four five six seven eight"]),
            model_prefix=str(tmp_path / "other"),
            vocab_size=25,
            model_type="bpe",
            character_coverage=1.0,
            user_defined_symbols=list(symbols),
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
        return tmp_path / "other.model"

    return make


def test_a_bpe_model_without_blank_is_refused(refused, bare_words, flags, bpe_of):
    path = bpe_of("<blank>", "<sos/eos>")
    error = refused(*bare_words(*flags(), bpe_model=path))
    assert f"--bpe-model {path} has no token <blk>" in error


def test_a_bpe_model_of_another_size_is_refused(refused, bare_words, flags, bpe_models):
    path = bpe_models.larger
    error = refused(*bare_words(*flags(), bpe_model=path))
    assert f"--bpe-model {path} has 26 tokens" in error
    assert "epoch-99.pt are for 25" in error
    for innocent in ("recipe", "flags", "size mismatch"):
        assert innocent not in error


def test_a_bpe_model_of_another_size_is_named_before_the_flags(
    refused, bare_words, bpe_models
):
    error = refused(*bare_words(bpe_model=bpe_models.larger))
    assert "has 26 tokens" in error and "are for 25" in error


@pytest.fixture
def lang_dir(tmp_path):
    """The folder of a tokens.txt of so many characters."""

    def make(size):
        folder = tmp_path / f"lang-{size}"
        folder.mkdir()
        names = ["<blk>", "<sos/eos>", "<unk>"]
        names += [chr(ord("一") + i) for i in range(size - 3)]
        rows = "".join(f"{name} {i}\n" for i, name in enumerate(names))
        (folder / "tokens.txt").write_text(rows, "utf8")
        return folder

    return make


def test_characters_of_another_number_are_refused(
    refused, invoke, bare_words, flags, lang_dir
):
    path = lang_dir(31)
    error = refused(*bare_words(*flags(), bpe_model=path))
    assert f"{path} has 31 tokens" in error and "are for 25" in error
    assert invoke(*bare_words(*flags(), bpe_model=lang_dir(25))).code == 0


def test_a_head_of_ctc_alone_tells_its_symbols_too(
    refused, bare_exp, bare_words, flags, bpe_models
):
    path = bare_exp / "pretrained.pt"
    state = torch.load(path, weights_only=True)["model"]
    heads = ("decoder.", "joiner.", "simple_")
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    torch.save({"model": state}, path)
    words = (*flags(), "--use-transducer", 0)
    error = refused(*bare_words(*words, bpe_model=bpe_models.larger))
    assert "has 26 tokens" in error and "are for 25" in error


def test_the_blank_is_where_the_bpe_model_has_it(
    invoke, bare_words, flags, bpe_of, tmp_path
):
    path = bpe_of("<sos/eos>", "<blk>")
    assert invoke(*bare_words(*flags(), bpe_model=path)).code == 0
    assert Fingerprint.read(tmp_path / "out_kd").blank_id == 1


# Options that nobody knows


@pytest.fixture
def commands(dump_words, bare_words, teacher_words, in_cuts, flags, tmp_path):
    return {
        "dump": dump_words(),
        "dump-bare": bare_words(*flags()),
        "quantizer": ["quantizer", in_cuts, tmp_path / "q", *teacher_words]
        + ["--layer", 1, "--iters", 1, "--num-vectors", 600],
        "student": ["student", *teacher_words, "--student-dir", tmp_path / "student"],
    }


@pytest.mark.parametrize(
    "unknown",
    [("--keep-latice", "top:8"), ("--keep-latice=top:8",), ("--keep-latice",)],
    ids="word equals alone".split(),
)
@pytest.mark.parametrize("command", ["dump", "dump-bare", "quantizer", "student"])
def test_an_option_that_nobody_knows_is_refused_by_name(
    refused, commands, command, unknown
):
    if command == "quantizer":
        pytest.importorskip("multi_quantization")
    error = refused(*commands[command], *unknown)
    assert "--keep-latice" in error and "train.py" in error
    assert "is an option neither of this command nor of" in error


def test_a_third_file_is_refused(refused, dump_words):
    assert "stray.jsonl is an option neither" in refused(*dump_words("stray.jsonl"))


def test_flags_before_the_files_are_refused(refused, dump_words, in_cuts):
    command, *words = dump_words()
    assert str(in_cuts) == str(words[0])
    assert "--joiner-dim" in refused(command, "--joiner-dim", 20, *words)


def test_a_recipe_without_parser_takes_no_flags(refused, dump_words, tmp_path):
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "train.py").write_text("get_params = get_model = lambda *args: {}\n")
    error = refused(*dump_words("--recipe", folder, "--joiner-dim", 20))
    assert "has no function get_parser" in error


# Values


@pytest.mark.parametrize(
    "words, parts",
    [
        (("--joiner-dim", "wide"), ("--joiner-dim", "int", "'wide'")),
        (("--joiner-dim", "2.5"), ("--joiner-dim", "int", "'2.5'")),
        (("--causal", "perhaps"), ("--causal", "Boolean")),
        (("--joiner-dim",), ("--joiner-dim", "expected one argument")),
    ],
    ids="word fraction bool none".split(),
)
@pytest.mark.parametrize("command", ["dump", "dump-bare"])
def test_a_flag_of_another_type_is_refused(refused, commands, command, words, parts):
    error = refused(*commands[command], *words)
    assert "train.py refuses the model's flags: " in error
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    "words, both",
    [
        (("--joiner-dim", 24), ("--joiner-dim is 24", "trained with 20")),
        (("--encoder-dim", "16,32"), ("--encoder-dim is 16,32", "with 16,24")),
        (("--causal", 1), ("--causal is True", "trained with False")),
        (("--use-ctc", "false"), ("--use-ctc is False", "trained with True")),
        (("--feature-dim", 80), ("--feature-dim is 80", "trained with 20")),
    ],
    ids="int list bool other-bool features".split(),
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(
    refused, dump_words, words, both
):
    error = refused(*dump_words(*words))
    assert "epoch-2.pt" in error and all(part in error for part in both), error


def test_flags_that_agree_with_the_checkpoint_are_taken(
    invoke, dump_words, flags, tmp_path, teacher_exp
):
    plain = tmp_path / "plain.jsonl.gz"
    assert invoke(*dump_words(out=plain)).code == 0
    words = (*flags(), "--use-cr-ctc", "no", "--sample-rate", 8000)
    assert invoke(*dump_words(*words)).code == 0
    assert records(tmp_path / "out.jsonl.gz") == records(plain)


def test_only_what_was_given_is_found(recipe):
    words = "--joiner-dim 96 --causal 1 --chunk-size -1".split()
    found = params_of_flags(recipe, words)
    assert found == {"joiner_dim": 96, "causal": True, "chunk_size": "-1"}
    assert params_of_flags(recipe, []) == {}
    with pytest.raises(KDError, match="refuses the model's flags.*--num-epochs"):
        params_of_flags(recipe, ["--num-epochs", "few"])


# Chunks


def test_chunks_may_differ_from_those_of_the_training(
    invoke, dump_words, another_exp, make_model, hear, tmp_path, read_targets
):
    folder, own = another_exp(seed=7, **CHUNKS)
    other = make_model(seed=7, vocab_size=25, **{**CHUNKS, "chunk_size": "4"})
    wider = {**CHUNKS, "left_context_frames": "8", "chunk_size": "4"}
    far = make_model(seed=7, vocab_size=25, **wider)
    told = {}
    for name, more, model in (
        ("own", (), own),
        ("other", ("--chunk-size", 4), other),
        ("far", ("--chunk-size", 4, "--left-context-frames", 8), far),
    ):
        out = tmp_path / f"{name}.jsonl.gz"
        assert invoke(*dump_words("--exp-dir", folder, *more, out=out)).code == 0
        for cut in load_manifest(out):
            logits = hear(model.eval(), cut).ctc_logits[0]
            expected = logits.log_softmax(-1).half().float().log_softmax(-1)
            assert torch.equal(read_targets(cut), expected)
        told[name] = records(out)[0]
    assert told["own"] != told["other"] != told["far"] != told["own"]
    hashes = hash_state_dict(own.state_dict())
    found = [Fingerprint.read(tmp_path / f"{name}_kd").teacher for name in told]
    assert found == [
        f"{hashes} chunk_size 16 left_context_frames 32",
        f"{hashes} chunk_size 4 left_context_frames 32",
        f"{hashes} chunk_size 4 left_context_frames 8",
    ]


@pytest.mark.parametrize(
    "more", [("--chunk-size", 8), ("--left-context-frames", 64)], ids=["chunk", "left"]
)
def test_other_chunks_leave_the_store(invoke, refused, dump_words, another_exp, more):
    words = ("--exp-dir", another_exp(seed=7, **CHUNKS)[0])
    assert invoke(*dump_words(*words)).code == 0
    same = ("--chunk-size", 16, "--left-context-frames", 32)
    assert "0.0 MB written" in invoke(*dump_words(*words, *same)).out
    error = refused(*dump_words(*words, *more))
    assert "made with teacher" in error and "--overwrite" in error


def test_chunks_of_a_causal_teacher_of_parameters_alone(
    invoke, dump_words, another_exp, bpe_models, flags, tmp_path
):
    folder, model = another_exp(seed=7, **CHUNKS)
    bare = tmp_path / "bare"
    bare.mkdir()
    torch.save({"model": model.state_dict()}, bare / "epoch-2.pt")
    words = ("--bpe-model", bpe_models.a, "--chunk-size", 8)
    whole = tmp_path / "whole.jsonl.gz"
    done = invoke(*dump_words("--exp-dir", folder, *words, out=whole))
    assert done.code == 0
    words = (*flags(), *words, "--causal", 1, "--left-context-frames", 32)
    assert invoke(*dump_words("--exp-dir", bare, *words)).code == 0
    assert records(tmp_path / "out.jsonl.gz") == records(whole)


def test_chunks_that_are_no_numbers_are_refused(refused, dump_words, another_exp):
    words = ("--exp-dir", another_exp(seed=7, **CHUNKS)[0], "--chunk-size", "wide")
    error = refused(*dump_words(*words))
    assert "can't build the model" in error and "wide" in error


def test_a_whole_utterances_teacher_has_no_chunks_in_its_name(
    invoke, dump_words, teacher_exp, tmp_path
):
    assert invoke(*dump_words()).code == 0
    expected = hash_state_dict(teacher_exp.models["epoch-2"].state_dict())
    assert Fingerprint.read(tmp_path / "out_kd").teacher == expected


@pytest.mark.parametrize("slip", ["--kd-keep", "--encoder-di"])
def test_an_option_of_training_and_an_abbreviation_are_refused(
    refused, dump_words, slip
):
    assert slip in refused(*dump_words(slip, "top:3"))


# In training


@pytest.fixture
def released(bare_exp, teacher_exp, bpe_models, flags):
    """Params of a student whose teacher in training is a released checkpoint."""

    def params(**changes):
        defaults = {option.dest: option.default for option in all_options()}
        return {
            **defaults,
            "kd_teacher_exp_dir": str(bare_exp),
            "kd_teacher_recipe": str(teacher_exp.recipe),
            "kd_teacher_epoch": 99,
            "kd_teacher_use_averaged_model": False,
            "kd_teacher_bpe_model": str(bpe_models.a),
            "kd_teacher_model_flags": shlex.join(map(str, flags())),
            "vocab_size": 25,
            "blank_id": 0,
            **changes,
        }

    return params


def test_parameters_alone_are_a_teacher_in_training_too(released, teacher_exp):
    teacher, name = online_teacher(released())
    assert name == ""
    x, lens = torch.randn(2, 60, 20), torch.tensor([60, 41])
    expected = Teacher([teacher_exp.models["epoch-2"]]).targets(x, lens)
    assert torch.equal(teacher.targets(x, lens).parts["ctc"], expected.parts["ctc"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kd_teacher_bpe_model": ""}, "give --kd-teacher-bpe-model and the model's"),
        ({"kd_teacher_model_flags": ""}, "are not those of the model"),
        ({"kd_teacher_model_flags": "--x 1"}, "--x is an option neither of"),
        ({"kd_teacher_model_flags": "'x"}, '^--kd-teacher-model-flags is "\'x"'),
        ({"kd_teacher_use_averaged_model": True}, "--kd-teacher-use-averaged-model 0"),
        ({"kd_teacher_iter": 8}, "--kd-teacher-iter 8 --kd-teacher-avg 1 need 1"),
    ],
    ids="bpe flags unknown quotation averaged iter".split(),
)
def test_a_refusal_in_training_names_the_options_of_training(released, changes, words):
    with pytest.raises(KDError, match=words):
        online_teacher(released(**changes))
