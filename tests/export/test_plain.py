"""The plain form and its reader: the tokens and numbers of the recipe's model."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from exporting import encoded

from icefall_kd.decode.ctc import CtcSearch
from icefall_kd.decode.greedy import GreedySearch
from icefall_kd.errors import KDError
from icefall_kd.export.plain import PlainForm, write_plain
from icefall_kd.export.plain_check import Difference, require_close
from icefall_kd.export.plain_graph import FORBIDDEN
from icefall_kd.export.plain_reader import PlainReader

FORM = PlainForm(61, 20, takes_mean=True)
LENGTHS = (61, 60, 44, 23, 9)


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(
        num_encoder_layers="1,1", use_ctc=True, vocab_size=7, downsampling_factor="1,4"
    )
    model.eval()
    x = torch.randn(1, 61, 20, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():  # else one token wins everywhere
        model.joiner.output_linear.weight *= 4
        out = model.forward_encoder(x, torch.tensor([61]))[0][0]
        head = model.ctc_output[1]
        head.bias.copy_(-head.weight @ out.mean(0))
    return model


@pytest.fixture(scope="module")
def utterances():
    generator = torch.Generator().manual_seed(5)
    return [3 * torch.randn(n, 20, generator=generator) + 2 for n in LENGTHS]


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A folder with the plain form of both heads, and the report."""
    folder = tmp_path_factory.mktemp("export") / "plain"
    return folder, write_plain(model, FORM, folder, {"tokens": "of seven"})


@pytest.fixture(scope="module")
def table_of_transducer(model, tmp_path_factory):
    """A folder with the transducer alone, its decoder as a table, without a mask."""
    folder = tmp_path_factory.mktemp("export") / "table"
    form = PlainForm(61, 20, ("transducer",), mask=False, decoder="table")
    return folder, write_plain(model, form, folder)


def searched(model, utterance, search, takes_mean=True):
    """The tokens that a search finds in an utterance alone, and encoder output."""
    x = utterance - utterance.mean(0) if takes_mean else utterance
    with torch.no_grad():
        out, lengths = model.forward_encoder(x[None], torch.tensor([len(x)]))
        return search(out, lengths).hypotheses[0].tokens, out[0]


def test_the_reader_finds_the_tokens_of_greedy_search(model, utterances, written):
    reader, search = PlainReader(written[0]), GreedySearch(model)
    found = [reader.greedy(x.numpy()) for x in utterances]
    assert found == [searched(model, x, search)[0] for x in utterances]
    assert len(set(map(tuple, found))) > 2 and max(map(len, found)) > 3


def test_the_reader_finds_the_tokens_of_the_ctc_head(model, utterances, written):
    reader, search = PlainReader(written[0]), CtcSearch(model)
    found = [reader.ctc_greedy(x.numpy()) for x in utterances]
    assert found == [searched(model, x, search)[0] for x in utterances]
    assert max(map(len, found)) > 3


def test_encoder_output_is_that_of_each_utterance_alone(model, utterances, written):
    reader, search = PlainReader(written[0]), GreedySearch(model)
    for x in utterances:
        whole = searched(model, x, search)[1]
        values = reader.encode(x.numpy())
        with torch.no_grad():
            projected = model.joiner.encoder_proj(whole).numpy()
            log_probs = model.ctc_output(whole).numpy()
        assert values["encoder_out"].shape == projected.shape
        assert np.abs(values["encoder_out"] - projected).max() <= 1e-5
        assert np.abs(values["ctc_log_probs"] - log_probs).max() <= 2e-5


def test_log_probs_are_as_near_to_float64_as_the_recipes_own(
    model, utterances, written
):
    reader, exact = PlainReader(written[0]), copy.deepcopy(model).double()
    own, plain = [], []
    for x in utterances:
        x = 9 * x
        given = (x - x.mean(0))[None], torch.tensor([len(x)])
        with torch.no_grad():
            log_probs = exact.ctc_output(encoded(exact, given[0].double(), given[1])[0])
            found = model.ctc_output(encoded(model, *given)[0])
        own.append((found - log_probs).abs().max())
        found = torch.from_numpy(reader.encode(x.numpy())["ctc_log_probs"])
        plain.append((found - log_probs[0]).abs().max())
    assert 0 < max(plain) <= max(1e-5, 2 * max(own))


def test_no_graph_has_an_operator_that_chips_refuse(written, table_of_transducer):
    for folder, report in (written, table_of_transducer):
        for path in folder.glob("*.onnx"):
            graph = onnx.load_model(str(path)).graph
            types = {node.op_type for node in graph.node}
            assert not types.intersection(FORBIDDEN)
            assert set(report.operators[path.name]) == types
            for value in (*graph.input, *graph.output, *graph.value_info):
                sizes = value.type.tensor_type.shape.dim
                assert all(d.HasField("dim_value") for d in sizes)
    assert "Pad" not in report.operators["encoder.onnx"]


def test_the_metadata_say_what_a_reader_needs_and_what_was_checked(written):
    folder, report = written
    values = json.loads((folder / "metadata.json").read_text("utf8"))
    assert values["form"] == "plain" and values["tokens"] == "of seven"
    assert values["plain"] == report.metadata
    assert values["plain"]["num_frames"] == 61 and values["plain"]["frames"] == 14
    parts = {d["part"] for d in values["checked"]["differences"]}
    assert parts == {"encoder_out", "ctc_log_probs", "decoder_out", "logits"}
    assert {d.num_frames for d in report.differences} == {0, 9, 30, 58, 60, 61}
    assert {d.step for d in report.differences} == {"plain", "onnx", "float64"}
    assert 0 < max(d.largest for d in report.differences) < 1e-5
    assert report.sizes == {p.name: p.stat().st_size for p in folder.iterdir()}


def test_a_table_of_contexts_is_the_decoder(model, utterances, table_of_transducer):
    folder, report = table_of_transducer
    assert sorted(report.sizes) == [
        "decoder_table.npy",
        "encoder.onnx",
        "joiner.onnx",
        "metadata.json",
    ]
    reader, search = PlainReader(folder), GreedySearch(model)
    x = utterances[0]
    found = reader.greedy(x.numpy())
    assert found == searched(model, x, search, takes_mean=False)[0] and len(found) > 3
    with pytest.raises(KDError, match="no CTC head: use greedy"):
        reader.ctc_greedy(x.numpy())


def test_without_a_mask_a_shorter_utterance_hears_the_padding(
    model, utterances, table_of_transducer
):
    x = utterances[2]
    out = PlainReader(table_of_transducer[0]).encode(x.numpy())["encoder_out"]
    whole = searched(model, x, GreedySearch(model), takes_mean=False)[1]
    with torch.no_grad():
        difference = out - model.joiner.encoder_proj(whole).numpy()
    assert np.abs(difference).max() > 1e-3


@pytest.mark.parametrize(
    "shape, sentence",
    [
        ((62, 20), "62 feature frames and the plain form is for 61"),
        ((8, 20), "8 feature frames and one frame of output needs 9"),
        (
            (61, 19),
            r"`features` are \(61, 19\), and the plain form takes \(frames, 20\)",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused_with_both_values(
    written, shape, sentence
):
    with pytest.raises(KDError, match=sentence):
        PlainReader(written[0]).greedy(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"num_frames": 8}, "`num_frames` is 8, and one frame of output needs 9"),
        ({"decoder": "graph"}, "`decoder` is graph: give one of embedding, table"),
        ({"heads": ("attention",)}, "`heads` has attention.*give transducer,ctc"),
        ({"opset": 10}, "`opset` is 10"),
        ({"mask": False, "takes_mean": True}, "`mask` is off, and the mean"),
        (
            {"decoder": "table", "table_mb": 0.001},
            "table of all 64 contexts has 0.0 MB and `table_mb` is 0.001",
        ),
    ],
)
def test_a_form_that_can_not_be_had_is_refused_and_nothing_is_written(
    model, tmp_path, changes, sentence
):
    form = PlainForm(**{"num_frames": 61, "feature_dim": 20, **changes})
    with pytest.raises(KDError, match=sentence):
        write_plain(model, form, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused_and_keeps_them(model, tmp_path):
    (tmp_path / "encoder.onnx").write_bytes(b"of another")
    with pytest.raises(KDError, match="holds files that are no plain form"):
        write_plain(model, FORM, tmp_path)
    assert (tmp_path / "encoder.onnx").read_bytes() == b"of another"


def test_a_step_that_changes_too_much_is_refused():
    differences = [Difference("logits", "onnx", 0, 3e-5, 2.0)]
    require_close(differences, 2e-5)  # grows with the values
    with pytest.raises(KDError, match="step onnx to the plain form changes logits"):
        require_close(differences, 1e-5)
    with pytest.raises(KDError, match="at 61 feature frames"):
        require_close([Difference("logits", "onnx", 61, float("nan"), 1.0)], 1.0)


def test_a_change_of_a_file_changes_the_tokens(model, utterances, written, tmp_path):
    """The comparison of tokens above can fail."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in written[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    table = np.load(folder / "token_embedding.npy")
    np.save(folder / "token_embedding.npy", table[::-1].copy())
    x = utterances[0].numpy()
    assert PlainReader(folder).greedy(x) != PlainReader(written[0]).greedy(x)


def test_a_folder_without_the_form_or_a_file_of_it_is_refused(written, tmp_path):
    with pytest.raises(KDError, match="holds no plain form"):
        PlainReader(tmp_path)
    for name in ("metadata.json", "encoder.onnx"):
        (tmp_path / name).write_bytes((written[0] / name).read_bytes())
    with pytest.raises(KDError, match="lacks .*joiner.onnx"):
        PlainReader(tmp_path)


def test_a_decoder_with_a_state_is_refused(model, tmp_path, make_model):
    other = make_model(num_encoder_layers="1,1").eval()
    other.decoder = torch.nn.LSTM(4, 4)
    with pytest.raises(KDError, match="LSTM has no context_size"):
        write_plain(other, FORM, tmp_path / "plain")
