"""A stream in the plain form: chunk by chunk what the recipe's model says."""

import json

import numpy as np
import onnx
import pytest
import torch
from exporting import encoded

from icefall_kd.errors import KDError
from icefall_kd.export.plain import PlainForm, write_plain
from icefall_kd.export.plain_graph import FORBIDDEN, make_graph, operators
from icefall_kd.export.plain_reader import PlainReader
from icefall_kd.export.plain_stream import chunks_of_recipe
from icefall_kd.export.sides import ctc_tokens, greedy, torch_side
from icefall_kd.export.streaming import torch_step

CHUNK, LEFT = 8, 16
FORM = PlainForm(0, 20, chunk_size=CHUNK, left_context=LEFT)
CAUSAL = {
    "causal": True,
    "chunk_size": str(CHUNK),
    "left_context_frames": str(LEFT),
    "num_encoder_layers": "1,2",
    "downsampling_factor": "1,4",
    "cnn_module_kernel": "7,5",
    "vocab_size": 7,
    "use_ctc": True,
}


@pytest.fixture(scope="module")
def model(make_model):
    model = make_model(**CAUSAL).eval()
    x = torch.randn(1, 61, 20, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():  # else one token wins everywhere
        model.joiner.output_linear.weight *= 4
        out = encoded(model, x, torch.tensor([61]))[0][0]
        head = model.ctc_output[1]
        head.bias.copy_(-head.weight @ out.mean(0))
    return model


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "plain"
    return folder, write_plain(model, FORM, folder)


@pytest.fixture(scope="module")
def utterances():
    """Of more chunks than fill the left context, and of one."""
    generator = torch.Generator().manual_seed(5)
    return [3 * torch.randn(n, 20, generator=generator).numpy() for n in (131, 80, 29)]


def simulated(model, head, x):
    """What the recipe's own streaming modules say of an utterance."""
    chunks = chunks_of_recipe(model, CHUNK, LEFT, ("transducer", "ctc"))
    chunks.head = head
    return chunks.encode(torch_step(chunks), x[None])


def test_the_tokens_are_those_of_streaming_by_the_recipe(model, written, utterances):
    reader, side, found = PlainReader(written[0]), torch_side(model), []
    for x in utterances:
        rows = simulated(model, model.joiner.encoder_proj, x)
        found.append(reader.greedy(x))
        assert found[-1] == greedy(side, rows, 2, 0)
        rows = simulated(model, model.ctc_output, x)
        assert reader.ctc_greedy(x) == ctc_tokens(rows, 0)
    assert len(found[0]) > 3 and len(set(found[0])) > 1


def test_its_output_is_that_of_the_whole_utterance_under_the_mask(
    model, written, utterances
):
    x = utterances[0]
    values = PlainReader(written[0]).encode(x)
    rows = values["encoder_out"]
    assert rows.shape == (7 * CHUNK // 2, 20)
    whole, _ = encoded(model, torch.from_numpy(x)[None], torch.tensor([len(x)]))
    with torch.no_grad():
        expected = model.joiner.encoder_proj(whole[0, : len(rows)]).numpy()
    # The mask's last chunk is longer by what is left over.
    assert np.abs(rows[: 6 * CHUNK // 2] - expected[: 6 * CHUNK // 2]).max() <= 1e-5
    simulation = simulated(model, model.ctc_output, x)
    assert np.abs(values["ctc_log_probs"] - simulation).max() <= 1e-5


def test_no_graph_has_an_operator_that_chips_refuse(written):
    folder, report = written
    for path in folder.glob("*.onnx"):
        graph = onnx.load_model(str(path)).graph
        types = {node.op_type for node in graph.node}
        assert not types.intersection(FORBIDDEN)
        for value in (*graph.input, *graph.output, *graph.value_info):
            sizes = value.type.tensor_type.shape.dim
            assert all(d.HasField("dim_value") for d in sizes)
    parts = {d.part for d in report.differences}
    assert {"encoder_out", "ctc_log_probs", "states"} < parts
    assert 0 < max(d.largest for d in report.differences) <= 1e-5


def test_the_metadata_say_what_a_reader_needs(written):
    values = json.loads((written[0] / "metadata.json").read_text("utf8"))["plain"]
    assert (values["chunk_size"], values["left_context"]) == (CHUNK, LEFT)
    assert (values["num_frames"], values["frames"]) == (29, 4)


def test_less_than_a_chunk_is_refused(written):
    with pytest.raises(KDError, match="28 feature frames and a chunk takes 29: put"):
        PlainReader(written[0]).greedy(np.zeros((28, 20), np.float32))


@pytest.mark.parametrize("sizes", [(6, 16), (8, 10)])
def test_sizes_that_are_no_whole_frames_of_a_stack_are_refused(model, tmp_path, sizes):
    form = PlainForm(0, 20, chunk_size=sizes[0], left_context=sizes[1])
    with pytest.raises(KDError, match="not whole frames of a stack that downsamples"):
        write_plain(model, form, tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_causal_is_refused(make_model, tmp_path):
    other = make_model(num_encoder_layers="1,1").eval()
    with pytest.raises(KDError, match="is not causal, so it can't be streamed"):
        write_plain(other, FORM, tmp_path / "plain")


class Masks(torch.nn.Module):
    """Fills where a mask says so, which is all, nothing, or in part."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x.masked_fill(self.mask.expand_as(x), 0.0) + 1.0


def test_a_mask_that_masks_nothing_leaves_no_choice():
    x = torch.randn(2, 3)
    graph = make_graph(Masks(torch.zeros(3, dtype=torch.bool)), {"x": x}, ["y"], 13)
    assert operators(graph) == {"Add": 1}
    with pytest.raises(KDError, match="Masks has Where"):
        make_graph(Masks(torch.tensor([True, False, True])), {"x": x}, ["y"], 13)
