"""tools/whisper_from_ct2.py: a Whisper of CTranslate2 stays the same model."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tiny_whisper import whisper_folder  # noqa: F401

from icefall_kd.errors import KDError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
TOOL = Path(__file__).resolve().parents[1] / "tools" / "whisper_from_ct2.py"
TYPES = {"float32": 0, "int8": 1, "float16": 4}


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("whisper_from_ct2", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays_of(model):
    """The parameters by CTranslate2's names, joined as it joins them."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    heads = np.array(model.config.encoder_attention_heads, "i1")
    arrays = {"encoder/num_heads": heads, "decoder/num_heads": heads}

    def put(new, old, norm=False):
        for part, name in (("weight", "gamma"), ("bias", "beta")):
            arrays[f"{new}/{name if norm else part}"] = state[f"{old}.{part}"]

    def put_joined(new, old, letters):
        for part in ("weight", "bias"):
            none = np.zeros(model.config.d_model, "f4")  # keys have no bias
            values = [state.get(f"{old}.{x}_proj.{part}", none) for x in letters]
            arrays[f"{new}/{part}"] = np.concatenate(values)

    arrays["decoder/embeddings/weight"] = state["proj_out.weight"]
    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", f"model.encoder.{conv}")
    for side, count in (("encoder", 1), ("decoder", 2)):
        place = f"{side}/position_encodings/encodings"
        arrays[place] = state[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"model.{side}.layer_norm", True)
        for i in range(count):
            new, old = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            put_joined(f"{new}/self_attention/linear_0", f"{old}.self_attn", "qkv")
            put(f"{new}/self_attention/linear_1", f"{old}.self_attn.out_proj")
            norm = f"{old}.self_attn_layer_norm"
            put(f"{new}/self_attention/layer_norm", norm, True)
            if side == "decoder":
                put_joined(f"{new}/attention/linear_0", f"{old}.encoder_attn", "q")
                put_joined(f"{new}/attention/linear_1", f"{old}.encoder_attn", "kv")
                put(f"{new}/attention/linear_2", f"{old}.encoder_attn.out_proj")
                norm = f"{old}.encoder_attn_layer_norm"
                put(f"{new}/attention/layer_norm", norm, True)
            put(f"{new}/ffn/linear_0", f"{old}.fc1")
            put(f"{new}/ffn/linear_1", f"{old}.fc2")
            put(f"{new}/ffn/layer_norm", f"{old}.final_layer_norm", True)
    return arrays


def write(path, arrays, spec=b"WhisperSpec"):
    def text(name):
        return struct.pack("<H", len(name) + 1) + name + b"\0"

    with open(path, "wb") as f:
        f.write(struct.pack("<I", 6) + text(spec) + struct.pack("<2I", 3, len(arrays)))
        for name, array in arrays.items():
            f.write(text(name.encode()) + bytes([array.ndim]))
            f.write(struct.pack(f"<{array.ndim}I", *array.shape))
            f.write(bytes([TYPES[str(array.dtype)]]))
            f.write(struct.pack("<I", array.nbytes) + array.tobytes())


@pytest.fixture
def ct2(whisper_folder, tmp_path):  # noqa: F811
    """A tiny Whisper as CTranslate2 has it, with its arrays."""
    whisper = transformers.WhisperForConditionalGeneration
    model = whisper.from_pretrained(whisper_folder)
    folder = tmp_path / "ct2"
    folder.mkdir()
    write(folder / "model.bin", arrays_of(model))
    settings = {
        "suppress_ids": model.generation_config.suppress_tokens,
        "suppress_ids_begin": model.generation_config.begin_suppress_tokens,
        "alignment_heads": [[0, 0]],
        "lang_ids": [],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizer = Path(whisper_folder, "tokenizer.json").read_text("utf8")
    (folder / "tokenizer.json").write_text(tokenizer, "utf8")
    return folder, model


def test_a_converted_whisper_has_all_parameters_and_says_the_same(tool, ct2, tmp_path):
    import torch

    from icefall_kd.labels.whisper_model import Parts, Whisper

    folder, model = ct2
    tool.convert(folder, tmp_path / "new")
    parts = Parts(str(tmp_path / "new"))
    state = parts.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name
    whisper = Whisper(parts, torch.device("cpu"))
    audio = np.random.default_rng(0).normal(0, 0.3, 8000).astype("f4")
    (said,) = whisper.hear([audio])
    features = parts.features(audio, sampling_rate=16000, return_tensors="pt")
    (row,) = model.generate(features.input_features, max_new_tokens=12).tolist()
    text = parts.tokenizer.decode(row, skip_special_tokens=True)
    assert whisper.text(said.tokens) == " ".join(text.split()) != ""


def test_a_model_in_int8_or_of_another_kind_is_refused(tool, ct2, tmp_path):
    folder, model = ct2
    arrays = arrays_of(model)
    name = "encoder/conv1/weight"
    write(folder / "model.bin", {**arrays, name: arrays[name].astype("i1")})
    with pytest.raises(KDError, match=f"{name} of .* data type 1, and must have fl"):
        tool.convert(folder, tmp_path / "new")
    write(folder / "model.bin", arrays, b"TransformerSpec")
    with pytest.raises(KDError, match="holds a TransformerSpec, and must"):
        tool.convert(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()
