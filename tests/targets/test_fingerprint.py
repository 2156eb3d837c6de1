"""Fingerprints: what they are made of, and what they refuse."""

import json
import random
from dataclasses import fields

import pytest
import torch

from icefall_kd.errors import KDError
from icefall_kd.targets import Fingerprint
from icefall_kd.targets.fingerprint import FILENAME, hash_state_dict
from icefall_kd.tokens import (
    TOKENS,
    hash_tokens,
    load_tokenizer,
    token_map,
    token_names,
    write_token_names,
)


def state():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=g),
        "b.bias": torch.randn(5, generator=g),
        "n": torch.tensor(3),
    }


def hash_of(path):
    return hash_tokens(token_names(load_tokenizer(path)))


# Hashes


def test_the_hash_depends_on_nothing_but_names_shapes_and_bytes(tmp_path):
    expected = hash_state_dict(state())
    assert len(expected) == 64
    assert hash_state_dict(dict(reversed(state().items()))) == expected
    transposed = {k: v.t().contiguous().t() for k, v in state().items()}
    assert hash_state_dict(transposed) == expected
    parameters = {k: v.clone() for k, v in state().items()}
    parameters["b.bias"].requires_grad_()
    assert hash_state_dict(parameters) == expected
    torch.save(state(), tmp_path / "state.pt")
    assert hash_state_dict(torch.load(tmp_path / "state.pt")) == expected


def one_bit(s):
    s["b.bias"].view(torch.int32)[3] ^= 1
    return s


@pytest.mark.parametrize(
    "change",
    [
        one_bit,
        lambda s: {**s, "n": torch.tensor(4)},
        lambda s: {**s, "more": torch.zeros(1)},
        lambda s: {k: v for k, v in s.items() if k != "n"},
        lambda s: {"c" + k[1:]: v for k, v in s.items()},
        lambda s: {**s, "a.weight": s["a.weight"].reshape(4, 3)},
        lambda s: {**s, "n": s["n"].to(torch.int32)},
        lambda s: {**s, "b.bias": s["b.bias"].bfloat16()},
    ],
    ids="bit number more fewer names shape int-type float-type".split(),
)
def test_the_hash_sees_a_change(change):
    assert hash_state_dict(change(state())) != hash_state_dict(state())


def test_a_model_and_its_copy_have_one_hash(make_model):
    a, b, c = make_model(seed=0), make_model(seed=0), make_model(seed=1)
    assert hash_state_dict(a.state_dict()) == hash_state_dict(b.state_dict())
    assert hash_state_dict(a.state_dict()) != hash_state_dict(c.state_dict())


def test_the_hash_of_tokens_sees_their_order_not_the_files_name(bpe_models, tmp_path):
    copied = tmp_path / "other.model"
    copied.write_bytes(bpe_models.a.read_bytes())
    assert hash_of(copied) == hash_of(str(bpe_models.a))
    assert hash_of(bpe_models.a) != hash_of(bpe_models.b)
    assert hash_of(bpe_models.a) != hash_of(bpe_models.larger)


def test_the_same_tokens_in_another_order_have_another_hash(bpe_models):
    import sentencepiece as spm

    orders = []
    for path in (bpe_models.ab, bpe_models.ba):
        sp = spm.SentencePieceProcessor(model_file=str(path))
        orders.append([sp.id_to_piece(i) for i in range(sp.get_piece_size())])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert hash_of(bpe_models.ab) != hash_of(bpe_models.ba)


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_a_bpe_model_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "bpe.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KDError, match="--bpe-model") as e:
        load_tokenizer(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_bpe_model_of_another_size_is_refused(bpe_models):
    load_tokenizer(bpe_models.a, 25)
    with pytest.raises(KDError, match="has 26 tokens and the teacher 25"):
        load_tokenizer(bpe_models.larger, 25)


# The store's symbols


NAMES = ["<blk>", "<sos/eos>", "<unk>", "▁a", "b", "ß", "▁"]


@pytest.fixture
def tokens(tmp_path):
    """The hash of the symbols that a store has."""
    write_token_names(tmp_path, NAMES)
    return hash_tokens(NAMES)


def test_symbols_are_found_in_another_order(tmp_path, tokens):
    student = NAMES[::-1]
    found = token_map(tmp_path, student, tokens)
    assert [student[i] for i in found] == NAMES
    assert token_map(tmp_path / "none", student, tokens) is None
    with pytest.raises(KDError, match="student lacks 'ß'"):
        token_map(tmp_path, [n for n in NAMES if n != "ß"], tokens)


def test_a_changed_byte_of_the_symbols_is_found(tmp_path, tokens):
    """Any one, also that of the last line's end; whatever it has become."""
    path = tmp_path / TOKENS
    data, rng = path.read_bytes(), random.Random(0)
    for at in range(len(data)):
        for flip in (1, 1 << rng.randrange(1, 8), data[at] ^ 0x0A):
            changed = bytearray(data)
            changed[at] ^= flip
            if bytes(changed) == data:
                continue
            path.write_bytes(changed)
            with pytest.raises(KDError, match="is damaged") as e:
                token_map(tmp_path, NAMES, tokens)
            message = str(e.value)
            assert message.startswith(str(path)) and "\n" not in message
            assert tokens[:8] in message and "icefall-kd dump" in message
    path.write_bytes(data)
    assert token_map(tmp_path, NAMES, tokens).tolist() == [*range(7)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"c\n",
        lambda data: data[::-1],
        lambda data: data.replace(b"\n", b"\r\n"),
    ],
    ids="empty half short longer reversed dos".split(),
)
def test_symbols_of_another_length_or_order_are_found(tmp_path, tokens, damage):
    path = tmp_path / TOKENS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KDError, match="is damaged"):
        token_map(tmp_path, NAMES, tokens)


# The file


def test_what_is_written_is_read(tmp_path, make_fingerprint):
    folder = tmp_path / "new" / "folder"
    make_fingerprint(frame_shift=0.04, tokens="ü").write(folder)
    assert Fingerprint.read(folder) == make_fingerprint(frame_shift=0.04, tokens="ü")
    assert [p.name for p in folder.iterdir()] == [FILENAME]  # nothing temporary


def test_the_file_is_plain_json(tmp_path, make_fingerprint):
    make_fingerprint().write(tmp_path)
    values = json.loads((tmp_path / FILENAME).read_text("utf8"))
    assert set(values) == {f.name for f in fields(Fingerprint)} - {"further_kinds"}
    assert values["vocab_size"] == 11 and values["ctc"] == "dense"


def test_writing_again_replaces(tmp_path, make_fingerprint):
    make_fingerprint(vocab_size=5).write(tmp_path)
    make_fingerprint(vocab_size=6).write(tmp_path)
    assert Fingerprint.read(tmp_path).vocab_size == 6


def test_a_store_without_fingerprint_is_refused(tmp_path):
    with pytest.raises(KDError, match="has no fingerprint.json.*icefall-kd dump") as e:
        Fingerprint.read(tmp_path)
    assert str(tmp_path) in str(e.value)


def without_teacher(text):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "teacher"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2].encode(),
        lambda text: b"[1, 2]",
        lambda text: without_teacher(text).encode(),
        lambda text: text.replace("teacher", "instructor").encode(),
        lambda text: b"\xff\xfe\x00" + text.encode(),
    ],
    ids="empty half list fewer other bytes".split(),
)
def test_a_damaged_file_is_refused(tmp_path, make_fingerprint, damage):
    make_fingerprint().write(tmp_path)
    path = tmp_path / FILENAME
    path.write_bytes(damage(path.read_text("utf8")))
    with pytest.raises(KDError, match="damaged or of another version.*dump") as e:
        Fingerprint.read(tmp_path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


# Comparisons


OTHER = {
    "teacher": "b" * 64,
    "tokens": "c" * 64,
    "vocab_size": 12,
    "blank_id": 3,
    "subsampling_factor": 2,
    "frame_shift": 0.02,
    "sampling_rate": 16000,
    "num_features": 80,
    "feature_type": "fbank",
    "feature_shift": 0.0125,
    "ctc": "top:8",
    "lattice": "collapsed",
    "s_range": 7,
    "hidden": "out:half",
    "version": 4,
    "further_kinds": {"phones": "half"},
}


def test_the_same_fingerprint_is_taken(make_fingerprint):
    make_fingerprint().check_same(make_fingerprint(), "folder")


@pytest.mark.parametrize("name", [*OTHER][:-1])  # each kind goes by its own name
def test_each_field_that_differs_is_refused_by_name(make_fingerprint, name):
    mine, other = make_fingerprint(), make_fingerprint(**{name: OTHER[name]})
    with pytest.raises(KDError, match=f"made with {name} ") as e:
        mine.check_same(other, "data/kd")
    message = str(e.value)
    assert repr(getattr(mine, name)) in message and repr(OTHER[name]) in message
    assert "data/kd" in message and "--overwrite" in message


def test_a_further_kind_that_differs_is_refused_by_its_name(make_fingerprint):
    assert set(OTHER) == {f.name for f in fields(Fingerprint)}
    mine = make_fingerprint(further_kinds={"simple": "dense"})
    for form in ("", "top:8"):
        other = make_fingerprint(further_kinds={"simple": form} if form else {})
        with pytest.raises(KDError, match=f"made with simple 'dense' .* '{form}'"):
            mine.check_same(other, "data/kd")
        with pytest.raises(KDError, match=f"made with simple '{form}' .* 'dense'"):
            other.check_same(mine, "data/kd")


def test_what_is_kept_is_read_off_the_fingerprint(make_fingerprint):
    assert make_fingerprint().forms == {"ctc": "dense"}
    assert str(make_fingerprint().kinds["ctc"].codec) == "dense"
    made = make_fingerprint(ctc="adaptive:.99:16@2", lattice="collapsed", blank_id=3)
    ctc, lattice = (kind.codec for kind in made.kinds.values())
    assert (ctc.entries, ctc.temperature) == (16, 2.0)
    assert lattice.node_codec is None and lattice.blank_id == 3
    with pytest.raises(KDError, match="'topp:3'"):
        make_fingerprint(ctc="topp:3").make_kinds()


def test_a_fitting_student_is_taken(make_fingerprint):
    made = make_fingerprint(tokens="c" * 64)
    made.check_student(11, 0)
    made.check_student(11, 0, "c" * 64)
    make_fingerprint(tokens="").check_student(11, 0, "d" * 64)  # not known


@pytest.mark.parametrize(
    "student, both",
    [
        ((12, 0, "c" * 64), ("12 tokens", "teacher's 11")),
        ((11, 2, "c" * 64), ("blank id is 2", "teacher's 0")),
        ((11, 0, "d" * 64), ("d" * 8, "c" * 8)),
    ],
    ids=["size", "blank", "tokens"],
)
def test_a_student_of_other_symbols_is_refused(make_fingerprint, student, both):
    with pytest.raises(KDError, match="--bpe-model") as e:
        make_fingerprint(tokens="c" * 64).check_student(*student)
    assert all(words in str(e.value) for words in both)
    assert "\n" not in str(e.value)
