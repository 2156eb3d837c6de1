"""A file in int8 has the weights that its scales promise."""

import numpy as np
import pytest
import torch
from torch import nn

from icefall_kd.export.files import write_onnx
from icefall_kd.export.quantize import write_int8
from icefall_kd.rounding import CHANNEL, SCALES, round_weight

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime.quantization")


@pytest.mark.parametrize("scales", SCALES)
def test_a_weight_is_rounded_with_the_scales_that_are_asked_for(tmp_path, scales):
    torch.manual_seed(1)
    layer = nn.Linear(37, 11).eval()
    with torch.no_grad():
        layer.weight[3] *= 50
    source, path = tmp_path / "a.onnx", tmp_path / "a.int8.onnx"
    x = torch.randn(3, 5, 37)  # of three dimensions: a MatMul
    write_onnx(layer, (x,), source, ["x"], ["y"], {"x": {0: "N"}}, 13)
    write_int8(source, path, scales)
    constants = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(path)).graph.initializer
    ]
    (weight,) = (c for c in constants if c.dtype == np.int8 and c.ndim == 2)
    sizes = [c.size for c in constants if c.dtype == np.float32 and c.ndim < 2]
    assert (1 in sizes) == (scales != CHANNEL)
    of_weight = [c for c in constants if c.dtype == np.float32 and c.size in (1, 11)]
    bias = layer.bias.detach().numpy()
    (scale,) = (c for c in of_weight if not np.array_equal(c, bias))
    expected = round_weight(layer.weight, scales == CHANNEL).detach().numpy()
    assert np.allclose(weight.T * scale.reshape(-1, 1), expected, rtol=1e-6)
