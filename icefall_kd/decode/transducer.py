"""A transducer head as a search asks it: decoder rows from tables, joiner rows.

A stateless decoder sees the last c tokens y_1 .. y_c alone (c is its context size).
It embeds them, and adds them up by a convolution over c positions, which is linear:

    decoder(y_1, .., y_c) = relu(T_1[y_1] + .. + T_c[y_c])

So c tables of (V + 1, D) numbers, made once, replace embedding and convolution. The
last row of a table belongs to -1, no token, which stands before an utterance's first
one, and is 0. A decoder of context 1 has no convolution and no relu. Where all
(V + 1)^c contexts are few enough, one table has the projected output of each.
"""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.errors import KDError, require

MAX_TABLE = 2**22  # numbers in the table of all contexts

Context = Tuple[int, ...]  # the last c tokens, -1 for none


def is_stateless(model: nn.Module) -> bool:
    """Return whether the decoder of ``model`` sees its last tokens alone.

    Args:
      model: A recipe's model with a transducer head.
    """
    return hasattr(model.decoder, "context_size")


class Transducer:
    """Decoder and joiner of a model, for a search.

    Args:
      model: A recipe's model in eval mode, with ``decoder`` and ``joiner``. Its
        parameters may not change afterwards: the tables would not follow.

    Raises:
      KDError: The model has no transducer head, or a decoder with a state.
    """

    def __init__(self, model: nn.Module) -> None:
        for part in ("decoder", "joiner"):
            require(
                getattr(model, part, None) is not None,
                f"the model {type(model).__name__} has no {part}, and this search "
                "needs a transducer head: use ctc_greedy, or train it with "
                "`use_transducer` 1",
            )
        if not is_stateless(model):
            raise KDError(
                f"the decoder {type(model.decoder).__name__} has no context_size, so "
                "it has a state and no lookup tables, and this search needs them: use "
                "GreedySearch"
            )
        self.model, self.joiner, self.decoder = model, model.joiner, model.decoder
        self.blank_id = int(self.decoder.blank_id)
        self.context_size = int(self.decoder.context_size)
        # Where a recipe gives the model an unk_id, icefall does not emit it either.
        self.silent = {self.blank_id, int(getattr(model, "unk_id", self.blank_id))}
        # What an utterance begins with.
        self.start: Context = (-1,) * (self.context_size - 1) + (self.blank_id,)
        self.base = self.vocab_size + 1
        # A context is one number: its tokens, -1 included, are the digits.
        self.powers = [
            self.base ** (self.context_size - 1 - i) for i in range(self.context_size)
        ]
        with torch.no_grad():
            self.tables = self._make_tables()
            self.all_rows = self._make_table_of_all()
            self.plain_joiner = self._is_plain()

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return self.joiner.output_linear.weight.device

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens with blank."""
        return self.joiner.output_linear.weight.size(0)

    def _make_tables(self) -> List[torch.Tensor]:
        """Return c tables (V + 1, D); [] for a decoder that is not as icefall's."""
        embedding = getattr(self.decoder, "embedding", None)
        if not isinstance(embedding, nn.Embedding):
            return []
        weight = embedding.weight  # (V, D)
        if self.context_size == 1:
            tables = [weight]
        else:
            conv = getattr(self.decoder, "conv", None)
            if not isinstance(conv, nn.Conv1d) or conv.bias is not None:
                return []
            # One position at a time: a convolution of kernel 1 over all tokens.
            tables = [
                nn.functional.conv1d(
                    weight.t().unsqueeze(0), conv.weight[:, :, i : i + 1], None,
                    groups=conv.groups,
                )[0].t()
                for i in range(self.context_size)
            ]  # fmt: skip
        # A row of zeros at the end: a tensor's index -1 finds it.
        tables = [torch.cat((t, t.new_zeros(1, t.size(1)))) for t in tables]
        # Nothing is guessed: another decoder might do more than this.
        samples = torch.arange(16 * self.context_size, device=weight.device) * 7
        samples = (samples % self.vocab_size).reshape(16, self.context_size)
        samples[0] = torch.tensor(self.start)
        expected = self.decoder(samples, need_pad=False).squeeze(1)
        found = self._look_up(tables, samples)
        return tables if _equal(found, expected) else []

    def _make_table_of_all(self) -> Optional[torch.Tensor]:
        """Return ((V + 1)^c, J), all contexts' rows; None if they are too many."""
        width = self.joiner.output_linear.weight.size(1)
        count = self.base**self.context_size
        if not self.tables or count * width > MAX_TABLE:
            return None
        numbers = torch.arange(count, device=self.device)
        # The digit V is the last row of a table, that of -1.
        digits = [numbers // power % self.base for power in self.powers]
        rows = self._look_up(self.tables, torch.stack(digits, 1))
        return self.joiner.decoder_proj(rows)

    def _is_plain(self) -> bool:
        """Return whether the joiner is a tanh and a linear layer, as icefall's."""
        width = self.joiner.output_linear.weight.size(1)
        x = torch.linspace(-2, 2, 3 * width, device=self.device).reshape(3, width)
        x = x.to(self.joiner.output_linear.weight.dtype)
        expected = self.joiner(x, x.flip(0), project_input=False)
        return _equal(self.joiner.output_linear(torch.tanh(x + x.flip(0))), expected)

    def _look_up(
        self, tables: Sequence[torch.Tensor], contexts: torch.Tensor
    ) -> torch.Tensor:
        """Return (R, D): the decoder's output for contexts (R, c)."""
        total = tables[0][contexts[:, 0]]
        for i in range(1, len(tables)):
            total += tables[i][contexts[:, i]]
        return total.relu_() if len(tables) > 1 else total

    def project(self, encoder_out: torch.Tensor) -> torch.Tensor:
        """Return the joiner's projection of encoder output.

        Args:
          encoder_out: (..., C).

        Returns:
          (..., J).
        """
        return self.joiner.encoder_proj(encoder_out)

    def decoder_rows(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return the projected decoder output for each of some contexts.

        Args:
          contexts: R of them, each the last c tokens; -1 for none.

        Returns:
          (R, J).
        """
        if self.all_rows is not None:
            numbers = [
                sum(y % self.base * power for y, power in zip(context, self.powers))
                for context in contexts
            ]
            if len(numbers) == 1:
                return self.all_rows[numbers[0]].unsqueeze(0)
            index = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            return self.all_rows.index_select(0, index)
        tokens = torch.tensor(contexts, dtype=torch.int64, device=self.device)
        return self._rows_of(tokens.reshape(len(contexts), self.context_size))

    def rows_of_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (R, J), as :meth:`decoder_rows`.

        Args:
          numbers: (R,), contexts as numbers: the digits, to base V + 1, are the tokens
            plus 1.
        """
        digits = [numbers // power % self.base - 1 for power in self.powers]
        return self._rows_of(torch.stack(digits, 1))

    def _rows_of(self, contexts: torch.Tensor) -> torch.Tensor:
        """Return (R, J) for contexts (R, c)."""
        if self.tables:
            rows = self._look_up(self.tables, contexts)
        else:
            rows = self.decoder(contexts, need_pad=False).squeeze(1)
        return self.joiner.decoder_proj(rows)

    def logits(
        self, frames: torch.Tensor, contexts: torch.Tensor, blank_penalty: float = 0.0
    ) -> torch.Tensor:
        """Return the joiner's logits for pairs of a frame and a context.

        Args:
          frames: (..., J), of :meth:`project`.
          contexts: (..., J), of :meth:`decoder_rows`; broadcast against ``frames``.
          blank_penalty: It is subtracted from blank's logit.

        Returns:
          (..., V).
        """
        if self.plain_joiner:
            linear = self.joiner.output_linear
            x = torch.add(frames, contexts).tanh_()
            logits = torch.nn.functional.linear(x, linear.weight, linear.bias)
        else:
            logits = self.joiner(frames, contexts, project_input=False)
        if blank_penalty:
            logits[..., self.blank_id] -= blank_penalty
        return logits

    def ask_alone(
        self,
        projected: torch.Tensor,
        frame: int,
        context: Context,
        blank_penalty: float = 0.0,
    ) -> int:
        """Return the best token of one frame, computed as icefall's loop does.

        Args:
          projected: (1, T, J), the projection of this utterance alone.
          frame: Its number, below T.
          context: The last c tokens.
          blank_penalty: It is subtracted from blank's logit.
        """
        labels = torch.tensor([context], device=projected.device)
        decoder_out = self.joiner.decoder_proj(self.decoder(labels, need_pad=False))
        one = projected[:, frame : frame + 1].unsqueeze(2)
        logits = self.joiner(one, decoder_out.unsqueeze(1), project_input=False)
        if blank_penalty:
            logits[..., self.blank_id] -= blank_penalty
        return int(logits.argmax())


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two ways gave the same, but for rounding."""
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())
