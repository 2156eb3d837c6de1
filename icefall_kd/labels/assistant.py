"""A small Whisper that drafts tokens, which the teacher checks several at a time.

The text stays the teacher's: transformers keeps a drafted token only where it is the
one that the teacher would have found itself.
"""

from typing import Any

import torch

from icefall_kd.errors import require
from icefall_kd.labels.whisper_model import Parts, as_output


class Assistant:
    """Drafts the tokens of a teacher.

    Args:
      parts: The assistant's.
      teacher: Those of the teacher.
      device: Where both run.

    Raises:
      KDError: another vocabulary or other features than the teacher's.
    """

    def __init__(self, parts: Parts, teacher: Parts, device: torch.device) -> None:
        sizes = [p.model.config.vocab_size for p in (parts, teacher)]
        same = sizes[0] == sizes[1] and parts.vocabulary == teacher.vocabulary
        require(
            same,
            f"`assistant` is {parts.place}, whose {sizes[0]} tokens are not the "
            f"{sizes[1]} of `whisper` {teacher.place}: give a Whisper of the same "
            "tokens, such as tiny.en for small.en",
        )
        bins = [p.model.config.num_mel_bins for p in (parts, teacher)]
        require(
            bins[0] == bins[1],
            f"`assistant` is {parts.place} and hears {bins[0]} mel bins, and `whisper` "
            f"{teacher.place} {bins[1]}: give one that hears the same",
        )
        self.model = parts.model.to(device)
        encoders = [p.model.get_encoder() for p in (parts, teacher)]
        # As Distil-Whisper's, which need not run twice.
        self.encoder = None if _are_same(*encoders) else encoders[0]
        self.model.model.encoder = _Given()
        # Whisper's own `generate` adds a prompt and windows, a plain one drafts.
        kind = type(self.model)
        generate = next(c for c in kind.__mro__ if c.__name__ == "GenerationMixin")
        self.model.__class__ = type(
            kind.__name__, (kind,), {"generate": generate.generate}
        )

    def encode(self, features: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """The output of the assistant's encoder.

        Args:
          features: (N, F, T).
          encoded: The output of the teacher's.
        """
        if self.encoder is None:
            return encoded
        return self.encoder(features).last_hidden_state

    def ready(self, encoded: torch.Tensor) -> Any:
        """The model, which drafts for these windows.

        Args:
          encoded: What :meth:`encode` returned for them.
        """
        self.model.model.encoder.output = as_output(encoded)
        return self.model


class _Given(torch.nn.Module):
    """In place of an encoder, what it gave."""

    main_input_name = "input_features"
    output: Any = None

    def forward(self, input_features: Any = None, **_: Any) -> Any:
        return self.output


def _are_same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        value.shape == states[1][name].shape
        and torch.equal(value.cpu(), states[1][name].cpu())
        for name, value in states[0].items()
    )
