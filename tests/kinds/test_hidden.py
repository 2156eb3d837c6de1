"""Rows of hidden layers: which vectors they hold, their names and their bytes."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch

from icefall_kd import ModelTap
from icefall_kd.errors import KDError
from icefall_kd.kinds.hidden import (
    OUT,
    HiddenCodec,
    from_command_line,
    hidden_rows,
    load_quantizer,
    parse_hidden,
    save_quantizer,
)
from icefall_kd.types import EncoderOut


def t50_of(num_frames):
    """Frames at 50 Hz of so many feature frames."""
    return (num_frames - 7) // 2


# Rows


def fold(vectors):
    """(T50, C) to (T, 2, C): pairs, the last vector twice where T50 is odd."""
    if len(vectors) % 2:
        vectors = torch.cat((vectors, vectors[-1:]))
    return torch.stack((vectors[::2], vectors[1::2]), 1)


@pytest.mark.parametrize(
    "lens",
    [(61, 42, 23), (60, 41, 9), (63, 61, 40), (62, 62, 12)],
    ids="longest-odd longest-even second-odd two-longest".split(),
)
def test_an_utterances_rows_in_a_batch_are_those_alone(make_model, lens):
    """At 50 Hz the lengths are odd and even, those of the longest as well."""
    x = torch.randn(3, max(lens), 20, generator=torch.Generator().manual_seed(1))
    for row, n in zip(x, lens, strict=True):
        row[n:] = 1e4
    assert {t50_of(n) % 2 for n in lens} == {0, 1}
    with ModelTap(make_model(), layers=(0, 1)) as hook:
        together = hook.encode(x, torch.tensor(lens))
        for i, n in enumerate(lens):
            alone = hook.encode(x[i : i + 1, :n], torch.tensor([n]))
            t = int(alone.encoder_out_lens)
            for layer, shape in {0: (2, 16), 1: (2, 24), OUT: (1, 24)}.items():
                a, b = hidden_rows(together, layer)[i, :t], hidden_rows(alone, layer)
                assert b.shape == (1, t, *shape)
                torch.testing.assert_close(a, b[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_row_of_a_stack_is_a_pair_of_its_vectors(make_model, encoder_frames, layer):
    model = make_model()
    seen = []
    model.encoder.encoders[layer].register_forward_hook(
        lambda m, args, out: seen.append(out[:, 0])
    )
    for n in (61, 60, 23, 21, 10, 9):
        x = torch.randn(1, n, 20, generator=torch.Generator().manual_seed(n))
        with ModelTap(model, layers=[layer]) as hook:
            rows = hidden_rows(hook.encode(x, torch.tensor([n])), layer)
        vectors = seen.pop()
        assert len(vectors) == t50_of(n) and len(rows[0]) == encoder_frames(n)
        assert torch.equal(rows[0], fold(vectors))
        twice = torch.equal(rows[0, -1, 0], rows[0, -1, 1])
        assert twice == bool(t50_of(n) % 2), n


@pytest.mark.parametrize("t", [13, 7, 4])
def test_a_stack_of_another_rate_is_refused(t):
    """Of an encoder that subsamples by 2 or 8, whose rows hold another number."""
    out = EncoderOut(torch.zeros(1, t, 3), torch.tensor([t]))
    out.hidden, out.hidden_lens = {2: torch.zeros(1, 13, 5)}, torch.tensor([13])
    if t == 7:
        assert hidden_rows(out, 2).shape == (1, 7, 2, 5)
        return
    with pytest.raises(KDError, match=f"stack 2 gives 13 frames .* has {t}, .* out"):
        hidden_rows(out, 2)


def test_the_rows_of_the_encoders_output_are_its_frames(make_model, features):
    with ModelTap(make_model(), layers=[OUT]) as hook:
        out = hook.encode(*features)
    assert out.hidden == {}  # it is taken anyway
    assert torch.equal(hidden_rows(out, OUT), out.encoder_out[:, :, None])


@pytest.mark.parametrize("t50", [(7, 4, 1), (8, 3, 6), (1, 1, 1)])
def test_rows_of_any_lengths_are_folded_as_one_by_one(t50):
    g = torch.Generator().manual_seed(sum(t50))
    x = torch.randn(3, max(t50), 5, generator=g)
    lens = (torch.tensor(t50) + 1) // 2
    out = EncoderOut(torch.zeros(3, int(lens.max()), 2), lens)
    out.hidden, out.hidden_lens = {4: x}, torch.tensor(t50)
    rows = hidden_rows(out, 4)
    assert rows.shape == (3, int(lens.max()), 2, 5)
    for row, vectors, n, t in zip(rows, x, t50, lens.tolist(), strict=True):
        assert torch.equal(row[:t], fold(vectors[:n]))


def test_each_vector_has_the_gradient_of_its_places():
    """One place for each, two for the last of an odd length, none for padding."""
    x = torch.randn(2, 7, 3, requires_grad=True)
    lens = torch.tensor([4, 2])
    out = EncoderOut(torch.zeros(2, 4, 2), lens)
    out.hidden, out.hidden_lens = {0: x}, torch.tensor([7, 3])
    valid = torch.arange(4) < lens[:, None]
    hidden_rows(out, 0)[valid].sum().backward()
    counts = torch.tensor([[1, 1, 1, 1, 1, 1, 2], [1, 1, 2, 0, 0, 0, 0]])
    assert torch.equal(x.grad, counts[..., None].expand(2, 7, 3).float())


@pytest.mark.parametrize("layer", [0, 1, OUT])
def test_gradients_flow_through_rows_to_the_students_parameters(
    make_model, features, layer
):
    model = make_model().train()
    with ModelTap(model, layers=[layer]) as hook:
        model(x=features[0], x_lens=features[1], y=[[3, 4], [5], [7]], prune_range=3)
        rows = hidden_rows(hook.take(), layer)
    rows.square().sum().backward()
    assert model.encoder_embed.out.weight.grad.abs().max() > 0
    behind = model.encoder.encoders[1].parameters()  # behind stack 0
    reached = any(p.grad is not None and p.grad.abs().max() > 0 for p in behind)
    assert reached == (layer != 0)
    assert model.ctc_output[1].weight.grad is None


# Names


@pytest.mark.parametrize("text", ["0:half", "out:half", "3:mvq:8:0af9", "out:mvq:1:a"])
def test_a_name_is_read_and_written_back(text):
    codec = HiddenCodec.parse(text)
    assert str(codec) == text and parse_hidden(text) == (codec,)
    layer = text.split(":")[0]
    assert codec.layer == (OUT if layer == OUT else int(layer))
    assert codec.part == f"hidden.{layer}"


def test_a_list_of_names_is_read_in_its_order():
    assert parse_hidden("") == ()
    found = parse_hidden("3:half,out:half,0:mvq:8:ab")
    assert found == (HiddenCodec(3), HiddenCodec(OUT), HiddenCodec(0, 8, "ab"))


@pytest.mark.parametrize(
    "text",
    [
        *("3", "half", "3:", ":half", "3:full", "-1:half", "x:half", "Out:half"),
        *("3:half:8", "3:half\n", " 3:half", "1.5:half", "3:mvq", "3:mvq:8"),
        *("3:mvq:8:", "3:mvq::ab", "3:mvq:8:XY", "3:mvq:-8:ab"),
        "3:mvq:0:ab",  # no codes: it would be read as 3:half
    ],
)
def test_a_name_that_is_none_is_refused_in_one_sentence(text):
    with pytest.raises(KDError) as e:
        parse_hidden(f"1:half,{text}")
    assert repr(text) in str(e.value) and "LAYER:half or LAYER:QUANTIZER.pt" in str(
        e.value
    )
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["3:half,3:half", "out:half,0:half,out:mvq:8:ab", "3:half,03:half"]
)
def test_a_layer_in_two_forms_is_refused(text):
    with pytest.raises(
        KDError, match="hidden layer (3|out) occurs twice in .*one form"
    ):
        parse_hidden(text)


# Float16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 900.0])
@pytest.mark.parametrize("layer, r", [(2, 2), (OUT, 1)])
def test_half_comes_back_within_float16(layer, r, scale):
    rows = scale * torch.randn(13, r, 7, generator=torch.Generator().manual_seed(0))
    codec = HiddenCodec(layer)
    data = codec.encode(rows)
    found = codec.decode(data, 13)
    assert len(data) == 2 * rows.numel() and found.dtype == torch.float32
    assert torch.equal(found, rows.half().float())
    torch.testing.assert_close(found, rows, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_rows_of_any_type_are_kept_alike(kind):
    rows = torch.randint(-99, 99, (5, 2, 3)).to(kind).requires_grad_()
    data = HiddenCodec(0).encode(rows.detach())
    assert torch.equal(HiddenCodec(0).decode(data, 5), rows.detach().float())


@pytest.mark.parametrize("layer, r", [(2, 2), (OUT, 1)])
@pytest.mark.parametrize("cut", [1, 2, 3, 7])
def test_damaged_half_bytes_are_an_error(layer, r, cut):
    codec = HiddenCodec(layer)
    data = codec.encode(torch.randn(13, r, 7))
    for damaged in (data[:-cut], data + b"\0" * cut, b""):
        with pytest.raises(ValueError):
            codec.decode(damaged, 13)


# Codes


@pytest.fixture
def quantizer():
    """An untrained quantizer of vectors of 6 numbers to 4 codes."""
    package = pytest.importorskip("multi_quantization")
    torch.manual_seed(3)
    return package.Quantizer(6, 256, 4).eval()


@pytest.mark.parametrize("layer, r", [(2, 2), (OUT, 1)])
def test_codes_come_back_as_the_quantizers(quantizer, layer, r):
    rows = torch.randn(13, r, 6, generator=torch.Generator().manual_seed(0))
    codec = HiddenCodec(layer, 4, "ab")
    data = codec.encode(rows, quantizer)
    found = codec.decode(data, 13)
    with torch.no_grad():
        expected = quantizer.encode(rows.reshape(-1, 6), as_bytes=False)
    assert len(data) == 13 * r * 4 and found.dtype == torch.int64
    assert torch.equal(found, expected.reshape(13, r, 4))
    assert int(found.max()) > 127  # a byte has no sign


def test_codes_of_half_precision_rows_are_those_of_float32(quantizer):
    rows = torch.randn(9, 2, 6, generator=torch.Generator().manual_seed(0)).half()
    codec = HiddenCodec(0, 4, "ab")
    assert codec.encode(rows, quantizer) == codec.encode(rows.float(), quantizer)


@pytest.mark.parametrize("cut", [1, 3, 4, 8, 52])
def test_damaged_codes_are_an_error(quantizer, cut):
    codec = HiddenCodec(2, 4, "ab")
    data = codec.encode(torch.randn(13, 2, 6), quantizer)
    for damaged in (data[:-cut], data + b"\0" * cut, b""):
        with pytest.raises(ValueError):
            codec.decode(damaged, 13)
    with pytest.raises(ValueError, match="4 codes a vector, and not 8"):
        HiddenCodec(2, 8, "ab").decode(data, 13)


# Quantizer files


def test_a_quantizer_is_read_as_it_was_saved(quantizer, tmp_path):
    path = tmp_path / "new" / "q.pt"
    save_quantizer(quantizer, path)
    found = load_quantizer(path)
    assert [p.name for p in path.parent.iterdir()] == ["q.pt"]
    assert found.get_id() == quantizer.get_id()
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.encode(x), quantizer.encode(x))


def nothing(path, quantizer):
    pass


def a_folder(path, quantizer):
    path.mkdir()


def no_bytes(path, quantizer):
    path.write_bytes(b"")


def text(path, quantizer):
    path.write_text("no quantizer\n")


def latin_1(path, quantizer):
    path.write_bytes("café\n".encode("latin-1"))


def a_word(path, quantizer):
    path.write_text("Go\n")


def a_pickle(path, quantizer):
    path.write_bytes(pickle.dumps({"dim": 6, "codes": 4}, protocol=2))


def an_array(path, quantizer):
    np.save(path.open("wb"), np.zeros(3))


def a_tensor(path, quantizer):
    torch.save(torch.zeros(3), path)


def a_bare_state_dict(path, quantizer):
    torch.save(quantizer.state_dict(), path)


def other_codes(path, quantizer):
    torch.save({"dim": 6, "codes": 8, "state": quantizer.state_dict()}, path)


def codes_that_are_no_power_of_two(path, quantizer):
    torch.save({"dim": 6, "codes": 3, "state": quantizer.state_dict()}, path)


def a_dimension_that_is_no_number(path, quantizer):
    torch.save({"dim": "6", "codes": 4, "state": quantizer.state_dict()}, path)


def no_state(path, quantizer):
    torch.save({"dim": 6, "codes": 4, "state": None}, path)


def half_of_one(path, quantizer):
    save_quantizer(quantizer, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "make",
    [
        *(nothing, a_folder, no_bytes, text, latin_1, a_word, a_pickle),
        *(an_array, a_tensor, a_bare_state_dict, other_codes, no_state, half_of_one),
        *(codes_that_are_no_power_of_two, a_dimension_that_is_no_number),
    ],
    ids=lambda f: f.__name__,
)
def test_a_file_that_holds_no_quantizer_is_refused(quantizer, tmp_path, make):
    path = tmp_path / "q.pt"
    make(path, quantizer)
    with pytest.raises(KDError) as e:
        load_quantizer(path)
    assert f"the quantizer {path} can't be read" in str(e.value)
    assert "`icefall-kd quantizer`" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_what_a_failed_save_leaves_is_the_old_file(quantizer, tmp_path, monkeypatch):
    path = tmp_path / "q.pt"
    save_quantizer(quantizer, path)
    before = path.read_bytes()

    def fail(values, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError):
        save_quantizer(quantizer, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_command_lines_half_needs_no_quantizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "multi_quantization", None)
    assert from_command_line("1:half,out:half") == (
        (HiddenCodec(1), HiddenCodec(OUT)),
        {},
    )
    assert from_command_line("") == ((), {})


def test_the_command_lines_file_becomes_its_codes_and_hash(quantizer, tmp_path):
    path = tmp_path / "q.pt"
    save_quantizer(quantizer, path)
    codecs, files = from_command_line(f"0:half,1:{path},out:{path}")
    start = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert codecs == (
        HiddenCodec(0),
        HiddenCodec(1, 4, start),
        HiddenCodec(OUT, 4, start),
    )
    assert files == {1: path, OUT: path}
    assert parse_hidden(",".join(map(str, codecs))) == codecs


def test_the_command_lines_bad_texts_are_refused(quantizer, tmp_path):
    path = tmp_path / "q.pt"
    save_quantizer(quantizer, path)
    for text, words in [
        ("1", "hidden layer is '1'"),
        (f"x:{path}", "hidden layer is 'x:mvq:4:"),
        (f"1:half,1:{path}", "hidden layer 1 occurs twice"),
        (f"1:{path},01:{path}", "hidden layer 1 occurs twice"),
        (f"1:{path}x", "q.ptx can't be read"),
        ("1:mvq:8:ab", "the quantizer mvq:8:ab can't be read"),
    ]:
        with pytest.raises(KDError, match=words) as e:
            from_command_line(text)
        assert len(str(e.value).splitlines()) == 1


def test_without_the_package_its_install_line_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "multi_quantization", None)
    with pytest.raises(KDError, match="`pip install multi_quantization`"):
        from_command_line(f"1:{tmp_path / 'q.pt'}")
