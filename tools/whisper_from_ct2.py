#!/usr/bin/env python3
"""
Make a Whisper for transformers, and so for `icefall-kd label --whisper`, of a folder of
CTranslate2, such as faster-whisper's, in float16 or float32.

Usage:
  python tools/whisper_from_ct2.py FOLDER NEW_FOLDER

FOLDER has model.bin, config.json and tokenizer.json.
"""

import json
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO, Dict, Tuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

from icefall_kd.errors import one_sentence, require

Weights = Dict[str, np.ndarray]
DTYPES = {0: "<f4", 2: "<i2", 3: "<i4", 4: "<f2"}  # by CTranslate2's number
INT8 = 1
MULTILINGUAL = 51865  # tokens at least; models of English alone have one fewer


def read_weights(path: Path) -> Weights:
    """Read a model.bin of version 6.

    Args:
      path: The file.

    Returns:
      The arrays by CTranslate2's names, without aliases.

    Raises:
      KDError: another version, no Whisper, or weights in int8.
    """
    with open(path, "rb") as f:
        (version,) = struct.unpack("<I", f.read(4))
        name = _text(f)
        require(
            version == 6 and name == "WhisperSpec",
            f"{path} has version {version} and holds a {name}, and must have version 6 "
            "and hold a WhisperSpec: convert the model with a newer CTranslate2",
        )
        _, count = struct.unpack("<2I", f.read(8))
        return dict(_array(f, path) for _ in range(count))


def _text(f: BinaryIO) -> str:
    (length,) = struct.unpack("<H", f.read(2))
    return f.read(length)[:-1].decode()


def _array(f: BinaryIO, path: Path) -> Tuple[str, np.ndarray]:
    name, rank = _text(f), f.read(1)[0]
    shape = struct.unpack(f"<{rank}I", f.read(4 * rank))
    dtype = f.read(1)[0]
    (size,) = struct.unpack("<I", f.read(4))
    data = f.read(size)
    if dtype == INT8 and not rank:  # a setting
        return name, np.frombuffer(data, "i1").reshape(shape)
    require(
        dtype in DTYPES,
        f"{name} of {path} has CTranslate2's data type {dtype}, and must have float16 "
        "or float32: convert the model with --quantization float16",
    )
    return name, np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def _put(state: Dict[str, Any], name: str, weights: Weights, former: str) -> None:
    """Put a linear layer, a norm or a convolution into a state dict."""
    parts = {"weight": ("weight", "gamma"), "bias": ("bias", "beta")}
    for part, names in parts.items():
        for key in (f"{former}/{n}" for n in names):
            if key in weights:
                state[f"{name}.{part}"] = weights[key]


def _put_split(
    state: Dict[str, Any], name: str, weights: Weights, former: str, into: str
) -> None:
    """Put a projection that CTranslate2 has joined, such as of queries and keys."""
    for part in ("weight", "bias"):
        for letter, value in zip(
            into, np.split(weights[f"{former}/{part}"], len(into))
        ):
            if (letter, part) != ("k", "bias"):  # Whisper has none; it is 0 here
                state[f"{name}.{letter}_proj.{part}"] = value


def state_dict_of(weights: Weights, config: WhisperConfig) -> Dict[str, torch.Tensor]:
    """The parameters by the names of transformers.

    Args:
      weights: By CTranslate2's names.
      config: The model's sizes.
    """
    state: Dict[str, Any] = {}
    for conv in ("conv1", "conv2"):
        _put(state, f"model.encoder.{conv}", weights, f"encoder/{conv}")
    for side, layers in (
        ("encoder", config.encoder_layers),
        ("decoder", config.decoder_layers),
    ):
        place = f"{side}/position_encodings/encodings"
        state[f"model.{side}.embed_positions.weight"] = weights[place]
        _put(state, f"model.{side}.layer_norm", weights, f"{side}/layer_norm")
        for i in range(layers):
            new, old = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attentions = [("self_attn", "self_attention", ("qkv",))]
            if side == "decoder":
                attentions.append(("encoder_attn", "attention", ("q", "kv")))
            for name, former, groups in attentions:
                for n, group in enumerate(groups):
                    place = f"{old}/{former}/linear_{n}"
                    _put_split(state, f"{new}.{name}", weights, place, group)
                place = f"{old}/{former}/linear_{len(groups)}"
                _put(state, f"{new}.{name}.out_proj", weights, place)
                place = f"{old}/{former}/layer_norm"
                _put(state, f"{new}.{name}_layer_norm", weights, place)
            _put(state, f"{new}.final_layer_norm", weights, f"{old}/ffn/layer_norm")
            for n in (1, 2):
                _put(state, f"{new}.fc{n}", weights, f"{old}/ffn/linear_{n - 1}")
    embedding = weights["decoder/embeddings/weight"]
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = embedding
    return {k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()}


def config_of(weights: Weights, ids: Dict[str, int]) -> WhisperConfig:
    """The sizes of a model.

    Args:
      weights: By CTranslate2's names.
      ids: Of special tokens.
    """
    vocab_size, d_model = weights["decoder/embeddings/weight"].shape
    sizes: Dict[str, int] = {}
    for side in ("encoder", "decoder"):
        names = {k.split("/")[1] for k in weights if k.startswith(f"{side}/layer_")}
        sizes[f"{side}_layers"] = len(names - {"layer_norm"})
        sizes[f"{side}_attention_heads"] = int(weights[f"{side}/num_heads"])
        width = weights[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
        sizes[f"{side}_ffn_dim"] = width
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_mel_bins=weights["encoder/conv1/weight"].shape[1],
        **sizes,
        max_source_positions=len(weights["encoder/position_encodings/encodings"]),
        max_target_positions=len(weights["decoder/position_encodings/encodings"]),
        **{name: ids["<|endoftext|>"] for name in ("pad_token_id", "eos_token_id")},
        bos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )


def generation_config_of(
    settings: Dict[str, Any], config: WhisperConfig, ids: Dict[str, int]
) -> GenerationConfig:
    """How text is generated, as OpenAI's models do in transformers.

    Args:
      settings: CTranslate2's config.json.
      config: The model's sizes.
      ids: Of special tokens.
    """
    is_multilingual = config.vocab_size >= MULTILINGUAL
    more: Dict[str, Any] = {}
    if is_multilingual:
        languages = {i: token for token, i in ids.items()}
        more["lang_to_id"] = {languages[i]: i for i in settings["lang_ids"]}
        tasks = ("transcribe", "translate")
        more["task_to_id"] = {task: ids[f"<|{task}|>"] for task in tasks}
    return GenerationConfig(
        is_multilingual=is_multilingual,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        **more,
    )


def convert(folder: Path, new: Path) -> None:
    """Write a Whisper for transformers.

    Args:
      folder: CTranslate2's.
      new: Where the model, its tokenizer and its features are written.

    Raises:
      KDError: a model that can't be converted.
    """
    weights = read_weights(folder / "model.bin")
    settings = json.loads((folder / "config.json").read_text("utf8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = config_of(weights, ids)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state_dict_of(weights, config))
    model.generation_config = generation_config_of(settings, config, ids)
    model.save_pretrained(new)
    WhisperTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")},
    ).save_pretrained(new)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(new)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with one_sentence():
        convert(*map(Path, sys.argv[1:]))
