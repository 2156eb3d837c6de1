"""Reads the plain form: numpy and onnxruntime, and the embedding table in between.

It is the proof that the files suffice, and an example for a program on a chip.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import numpy as np
import onnxruntime

from icefall_kd.errors import KDError, require

SILENCE = float(np.log(1e-10))  # a feature of no energy
MIN_FRAMES = 9  # feature frames of one frame


class PlainReader:
    """Decodes utterances with the files of a plain form.

    Args:
      folder: The folder that :func:`icefall_kd.export.plain.write_plain` wrote.
      threads: Threads of onnxruntime.

    Raises:
      KDError: The folder holds no plain form, or lacks a file of it.
    """

    def __init__(self, folder: Union[str, Path], threads: int = 1) -> None:
        folder = Path(folder)
        try:
            metadata = json.loads((folder / "metadata.json").read_text("utf8"))
        except FileNotFoundError:
            metadata = {}
        require(
            metadata.get("form") == "plain",
            f"{folder} holds no plain form (a metadata.json that says so): export the "
            "model in that form",
        )
        self.metadata: Dict[str, Any] = metadata["plain"]
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._encoder = self._session(folder / "encoder.onnx")
        if "transducer" in self.metadata["heads"]:
            self._joiner = self._session(folder / "joiner.onnx")
            if self.metadata["decoder"] == "table":
                self._table = np.load(_there(folder / "decoder_table.npy"))
            else:
                self._decoder = self._session(folder / "decoder.onnx")
                self._embedding = np.load(_there(folder / "token_embedding.npy"))

    def encode(self, features: np.ndarray) -> Dict[str, np.ndarray]:
        """Run the encoder on an utterance.

        Args:
          features: (T, F), as the recipe makes them, T from 9 to the form's
            ``num_frames``; of a stream that or more, which is encoded chunk by chunk,
            as many as are whole.

        Returns:
          By the name of an output, (T', C): ``encoder_out`` where there is a
          transducer, ``ctc_log_probs`` where there is a CTC head.

        Raises:
          KDError: More or fewer frames than the form takes, or of another width.
        """
        length, width = self.metadata["num_frames"], self.metadata["feature_dim"]
        require(
            features.ndim == 2 and features.shape[1] == width,
            f"`features` are {tuple(features.shape)}, and the plain form takes "
            f"(frames, {width}): compute them as its metadata.json says",
        )
        num_frames = len(features)
        if "chunk_size" in self.metadata:
            return self._encode_chunks(features)
        require(
            num_frames <= length,
            f"the utterance has {num_frames} feature frames and the plain form is for "
            f"{length}: export it for more frames, or cut the utterance",
        )
        require(
            num_frames >= MIN_FRAMES,
            f"the utterance has {num_frames} feature frames and one frame of output "
            f"needs {MIN_FRAMES}: leave it out",
        )
        padded = np.full((1, length, width), SILENCE, np.float32)
        padded[0, :num_frames] = features
        inputs = {"features": padded}
        frames = ((num_frames - 7) // 2 + 1) // 2
        if self.metadata["mask"]:
            inputs["mask"] = np.zeros((1, length), np.float32)
            inputs["mask"][0, :num_frames] = 1.0
        names = [output.name for output in self._encoder.get_outputs()]
        values = self._encoder.run(names, inputs)
        return {n: value[0, :frames] for n, value in zip(names, values)}

    def _encode_chunks(self, features: np.ndarray) -> Dict[str, np.ndarray]:
        """Encode a stream: the states of each chunk are inputs of the next."""
        length, chunk = self.metadata["num_frames"], self.metadata["chunk_size"]
        left = self.metadata["left_context"]
        require(
            len(features) >= length,
            f"the utterance has {len(features)} feature frames and a chunk takes "
            f"{length}: put silence behind it",
        )
        states = {
            value.name: np.zeros(value.shape, np.float32)
            for value in self._encoder.get_inputs()[2:]
        }
        names = [output.name for output in self._encoder.get_outputs()]
        rows: Dict[str, List[np.ndarray]] = {}
        begins = range(0, len(features) - length + 1, 2 * chunk)
        for i, begin in enumerate(begins):
            # What of the left context is there at all.
            mask = (np.arange(left) >= left - i * chunk)[None]
            inputs = {
                "features": features[None, begin : begin + length],
                "mask": mask.astype(np.float32),
                **states,
            }
            for name, value in zip(names, self._encoder.run(names, inputs)):
                if name.startswith("new_"):
                    states[name[len("new_") :]] = value
                else:
                    rows.setdefault(name, []).append(value[0])
        return {name: np.concatenate(values) for name, values in rows.items()}

    def greedy(self, features: np.ndarray) -> List[int]:
        """Search greedily with the transducer, at most one token a frame.

        Args:
          features: (T, F).

        Returns:
          The tokens.

        Raises:
          KDError: As :meth:`encode`, or the form has no transducer.
        """
        require(
            "transducer" in self.metadata["heads"],
            "the plain form has no transducer: use ctc_greedy",
        )
        blank, size = self.metadata["blank_id"], self.metadata["context_size"]
        tokens = [-1] * (size - 1) + [blank]
        decoder_out = self.decoder_out(tokens)
        for row in self.encode(features)["encoder_out"]:
            token = int(self.logits(row[None], decoder_out).argmax())
            if token not in self.metadata["silent"]:
                tokens.append(token)
                decoder_out = self.decoder_out(tokens[-size:])
        return tokens[size:]

    def logits(self, encoder_out: np.ndarray, decoder_out: np.ndarray) -> np.ndarray:
        """Return the joiner's logits of a frame.

        Args:
          encoder_out: (1, joiner's width).
          decoder_out: (1, joiner's width).

        Returns:
          (1, V).
        """
        inputs = {"encoder_out": encoder_out, "decoder_out": decoder_out}
        return self._joiner.run(None, inputs)[0]

    def ctc_greedy(self, features: np.ndarray) -> List[int]:
        """Take the best token of each frame, without repeats and blanks.

        Args:
          features: (T, F).

        Returns:
          The tokens.

        Raises:
          KDError: As :meth:`encode`, or the form has no CTC head.
        """
        require(
            "ctc" in self.metadata["heads"],
            "the plain form has no CTC head: use greedy",
        )
        best = self.encode(features)["ctc_log_probs"].argmax(axis=1)
        changes = np.flatnonzero(np.diff(best, prepend=-1))
        blank = self.metadata["blank_id"]
        return [int(token) for token in best[changes] if token != blank]

    def decoder_out(self, context: Sequence[int]) -> np.ndarray:
        """Return what the decoder says after some tokens.

        Args:
          context: The last tokens, as many as the decoder sees, -1 for none.

        Returns:
          (1, joiner's width).
        """
        if self.metadata["decoder"] == "table":
            index = 0
            for token in context:
                index = index * (self.metadata["vocab_size"] + 1) + token + 1
            return self._table[index][None]
        rows = np.zeros((1, len(context), self._embedding.shape[1]), np.float32)
        for place, token in enumerate(context):
            if token >= 0:
                rows[0, place] = self._embedding[token]
        return self._decoder.run(None, {"embeddings": rows})[0]

    def _session(self, path: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            str(_there(path)), self._options, providers=["CPUExecutionProvider"]
        )


def _there(path: Path) -> Path:
    """Refuse a file that is not there."""
    if not path.is_file():
        raise KDError(f"the plain form lacks {path}: export it again")
    return path
