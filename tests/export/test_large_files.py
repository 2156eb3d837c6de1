"""Files of ONNX that are larger than one file may be."""

import numpy as np
import pytest
import torch
from exporting import encoded

from icefall_kd.export import files
from icefall_kd.export.files import weights_of, write_metadata, write_offline
from icefall_kd.export.graph import exportable
from icefall_kd.export.quantize import write_int8
from icefall_kd.export.sides import session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
OPTIONS = {"takes_mean": False, "opset": 13}


@torch.no_grad()
def test_the_weights_of_a_large_model_are_in_a_file_of_their_own(
    make_model, make_settings, tmp_path, monkeypatch
):
    shape = {"num_encoder_layers": "1,1"}
    model, settings = make_model(**shape).eval(), make_settings(**shape)
    path = tmp_path / "encoder-epoch-9-avg-2.onnx"
    write_offline(exportable(model), settings, "encoder", path, **OPTIONS)
    size = path.stat().st_size
    assert not weights_of(path).exists()
    monkeypatch.setattr(files, "LARGE", 1000)
    write_offline(exportable(model), settings, "encoder", path, **OPTIONS)
    assert weights_of(path).name == "encoder-epoch-9-avg-2.weights"
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {path.name, weights_of(path).name}
    assert 0.5 * size < weights_of(path).stat().st_size < size
    # Metadata are written after the graph, and the weights stay where they are.
    before = path.stat().st_size
    write_metadata(path, {"comment": "another"})
    assert abs(path.stat().st_size - before) < 1000
    x, x_lens = torch.randn(1, 61, 20), torch.tensor([61])
    expected = model.joiner.encoder_proj(encoded(model, x, x_lens)[0]).numpy()
    found = session(path)(x.numpy(), x_lens.numpy())
    assert np.abs(found - expected).max() < 1e-4
    small = tmp_path / "encoder.int8.onnx"
    write_int8(path, small)
    found = session(small)(x.numpy(), x_lens.numpy())
    assert 0 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
    assert {p.name for p in tmp_path.iterdir()} == {*names, small.name}
    # A smaller model in its place leaves none of the weights.
    monkeypatch.undo()
    write_offline(exportable(model), settings, "encoder", path, **OPTIONS)
    assert not weights_of(path).exists() and path.stat().st_size == size
