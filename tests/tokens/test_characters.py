"""Symbols that are characters, as icefall's recipes for Chinese have them."""

import pytest

from icefall_kd.errors import KDError
from icefall_kd.targets.stand_in import stand_in
from icefall_kd.tokens import load_tokenizer, token_names
from icefall_kd.tokens.characters import Characters

LINES = ["<blk> 0", "<sos/eos> 1", "<unk> 2", "你 3", "好 4", "A 5", "#0 6", "#1 7"]


@pytest.fixture
def lang_dir(tmp_path):
    def make(lines=LINES):
        (tmp_path / "tokens.txt").write_text("\n".join(lines) + "\n", "utf8")
        return tmp_path

    return make


def test_texts_become_the_labels_that_icefall_makes_of_them(lang_dir):
    found = Characters(lang_dir())
    assert found.encode(["你 好", "好\tA你", "天A", ""]) == [
        [3, 4],
        [4, 5, 3],
        [2, 5],
        [],
    ]
    assert found.encode("你好") == [3, 4]
    assert found.decode([[3, 4], [], [5]]) == ["你 好", "", "A"]


def test_icefall_itself_agrees(lang_dir):
    compiler = pytest.importorskip("icefall.char_graph_compiler")
    from icefall.lexicon import Lexicon

    folder = lang_dir()
    (folder / "lexicon.txt").write_text("你 你\n好 好\nA A\n<UNK> <unk>\n", "utf8")
    (folder / "words.txt").write_text("<eps> 0\n你 1\n好 2\nA 3\n#0 4\n", "utf8")
    k2 = pytest.importorskip("k2")
    fsa = k2.Fsa.from_str("0 1 1 1 0\n1 2 -1 -1 0\n2", aux_label_names=["aux_labels"])
    import torch

    torch.save(fsa.as_dict(), folder / "L.pt")
    torch.save(fsa.as_dict(), folder / "Linv.pt")
    lexicon = Lexicon(folder)
    theirs = compiler.CharCtcTrainingGraphCompiler(lexicon, torch.device("cpu"))
    texts = ["你 好A", "天 好\t你", "A"]
    assert Characters(folder).encode(texts) == theirs.texts_to_ids(texts)


def test_symbols_stand_in_their_order_without_those_of_graphs(lang_dir):
    folder = lang_dir([*LINES[::-1], ""])
    assert token_names(load_tokenizer(folder)) == [
        "<blk>",
        "<sos/eos>",
        "<unk>",
        *"你好A",
    ]
    assert load_tokenizer(folder, 6).get_piece_size() == 6


def test_a_folder_with_a_bpe_model_means_that(lang_dir, bpe_models):
    folder = lang_dir()
    (folder / "bpe.model").write_bytes(bpe_models.a.read_bytes())
    assert token_names(load_tokenizer(folder)) == token_names(
        load_tokenizer(bpe_models.a)
    )


def test_a_transcript_stands_in(lang_dir):
    assert stand_in(load_tokenizer(lang_dir()), 0) in set("你好A")


@pytest.mark.parametrize(
    "lines, words",
    [
        (["<blk> 0", "<unk>"], "can't be read"),
        (["<blk> 0", "<unk> 2"], "lacks 1"),
        (["<blk> zero"], "can't be read"),
    ],
)
def test_a_damaged_list_is_refused(lang_dir, lines, words):
    with pytest.raises(KDError, match=f"{words}.*--lang-dir") as e:
        load_tokenizer(lang_dir(lines))
    assert "\n" not in str(e.value)


def test_symbols_without_an_unknown_one_can_be_told_but_not_made_of_texts(lang_dir):
    """A lang folder of phones, whose CTC head is distilled without any text."""
    sp = load_tokenizer(lang_dir(["<blk> 0", "AA 1"]))
    assert token_names(sp) == ["<blk>", "AA"] and sp.piece_to_id("AA") == 1
    with pytest.raises(KDError, match="lacks <unk>.*--lang-dir"):
        sp.encode("A")


def test_another_number_of_symbols_is_refused(lang_dir):
    with pytest.raises(KDError, match="has 6 tokens and the teacher 7"):
        load_tokenizer(lang_dir(), 7)
