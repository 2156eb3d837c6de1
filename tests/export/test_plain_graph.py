"""What does not depend on the inputs is computed; what is left is plain, or refused."""

import onnxruntime
import pytest
import torch
from torch import nn

from icefall_kd.errors import KDError
from icefall_kd.export.plain_graph import (
    MIN_OPSET,
    make_graph,
    max_opset,
    operators,
    require_opset,
)


class Reshaped(nn.Module):
    """Asks for shapes as the recipes' modules do."""

    def forward(self, x):
        num_frames, width = x.shape
        zeros = torch.zeros(num_frames, 3 * width - x.shape[1])
        return torch.cat((x, zeros), -1).reshape(num_frames, 3, -1).sum(1)


class Gathers(nn.Module):
    def forward(self, x):
        return x.gather(1, x.argsort(dim=1))


class Chooses(nn.Module):
    def forward(self, x):
        return torch.where(x > 0, x, 2 * x)


@pytest.mark.parametrize("opset", [MIN_OPSET, 13, max_opset()])
def test_shapes_become_numbers_and_the_output_stays(opset):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    graph = make_graph(Reshaped().eval(), {"x": x}, ["y"], opset)
    assert operators(graph) == {"Concat": 1, "ReduceSum": 1, "Reshape": 1}
    assert graph.opset_import[0].version == opset
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    (out,) = session.run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(out), Reshaped()(x))


@pytest.mark.parametrize("module, name", [(Gathers, "Gather"), (Chooses, "Where")])
def test_an_operator_that_is_not_plain_is_refused_by_name(module, name):
    with pytest.raises(KDError, match=f"{module.__name__} has .*{name}"):
        make_graph(module().eval(), {"x": torch.randn(3, 4)}, ["y"], 13)


@pytest.mark.parametrize("opset", [MIN_OPSET - 1, max_opset() + 1])
def test_an_impossible_opset_is_named_with_those_that_can_be_had(opset):
    with pytest.raises(KDError, match=f"`opset` is {opset}.*{MIN_OPSET} to"):
        require_opset(opset)


def test_what_the_exporter_can_not_write_is_one_sentence():
    class Special(nn.Module):
        def forward(self, x):
            return torch.special.i1(x)  # a Bessel function

    with pytest.raises(KDError, match="can't write Special in opset 13") as refusal:
        make_graph(Special().eval(), {"x": torch.randn(3)}, ["y"], 13)
    assert "\n" not in refusal.value.sentence
