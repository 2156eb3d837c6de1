"""A transducer head as a search asks it: decoder rows from tables, joiner rows.

A stateless decoder sees the last c tokens y_1 .. y_c alone (c is its context size).
It embeds them, and adds them up by a convolution over c positions, which is linear:

    decoder(y_1, .., y_c) = relu(T_1[y_1] + .. + T_c[y_c])

So c tables of (V + 1, D) numbers, made once, replace embedding and convolution. The
first row of a table belongs to -1, no token, which stands before an utterance's first
one, and is 0. A decoder of context 1 has no convolution and no relu. Where all
(V + 1)^c contexts are few enough, one table has the projected output of each.

The joiner is tanh and a linear layer. A CPU has the sigmoid s in a fifth of the time
that tanh takes, and tanh(z) = 2 s(2z) - 1, so

    W tanh(f + r) + b = (2 W) s(2f + 2r) + (b - W 1)

with all factors in the matrices: the products here give 2f and 2r. Blank's row of W and
b is taken off all rows. So the logits are relative to blank's, which is 0. Neither the
best token nor a probability changes, and the maximum of the others is the lead on
blank.
"""

from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from icefall_kd.decode.products import Product
from icefall_kd.errors import KDError, require

MAX_TABLE = 2**22  # numbers in the table of all contexts
MAX_SEEN = 2**24  # numbers in the rows of contexts that are remembered

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
        # A context is one number: its digits, to this base, are the tokens plus 1.
        self.powers = [
            self.base ** (self.context_size - 1 - i) for i in range(self.context_size)
        ]
        self._silent_ids = torch.tensor(sorted(self.silent), device=self.device)
        with torch.no_grad():
            self._make_products()
            self.tables = self._make_tables()
            self.all_rows = self._make_table_of_all()
        # Where these are too many: the rows of contexts seen so far.
        weight = self.joiner.output_linear.weight
        self.rows = self.all_rows
        if self.rows is None:
            self.rows = weight.new_empty(MAX_SEEN // weight.size(1), weight.size(1))
        self._places: Dict[Context, int] = {}  # in rows, of each context seen so far

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
        tables = [torch.cat((t.new_zeros(1, t.size(1)), t)) for t in tables]
        # Nothing is guessed: another decoder might do more than this.
        samples = torch.arange(16 * self.context_size, device=weight.device) * 7
        samples = (samples % self.vocab_size).reshape(16, self.context_size)
        samples[0] = torch.tensor(self.start)
        expected = self.decoder(samples, need_pad=False).squeeze(1)
        found = self._look_up(tables, samples + 1)
        return tables if _equal(found, expected) else []

    def _make_table_of_all(self) -> Optional[torch.Tensor]:
        """Return ((V + 1)^c, J), all contexts' rows; None if they are too many."""
        width = self.joiner.output_linear.weight.size(1)
        count = self.base**self.context_size
        if not self.tables or count * width > MAX_TABLE:
            return None
        numbers = torch.arange(count, device=self.device)
        return self._project_rows(self._look_up(self.tables, self._digits(numbers)))

    def _make_products(self) -> None:
        """Make the joiner's products; its own modules, where it is not as icefall's."""
        joiner, linear = self.joiner, self.joiner.output_linear
        own = joiner.encoder_proj, joiner.decoder_proj
        self._project, self._project_rows = own
        self.plain_joiner = all(
            type(module) is nn.Linear and module.bias is not None
            for module in (*own, linear)
        )
        if not self.plain_joiner:
            return
        x, y = (
            torch.linspace(-2, 2, 64 * module.in_features, device=self.device)
            .reshape(64, module.in_features)
            .to(linear.weight.dtype)
            for module in own
        )
        x, y = own[0](x), own[1](y.flip(0))
        # Nothing is guessed: another joiner might do more than this.
        expected = joiner(x, y, project_input=False)
        expected = expected - expected[:, self.blank_id : self.blank_id + 1]
        self._project, self._project_rows = (
            Product(2 * module.weight, 2 * module.bias) for module in own
        )
        weight, bias = linear.weight, linear.bias
        weight, bias = weight - weight[self.blank_id], bias - bias[self.blank_id]
        self._output = Product(2 * weight, bias - weight.sum(1))
        if not _equal(self.logits(2 * x, 2 * y), expected):
            self.plain_joiner = False
            self._project, self._project_rows = own

    def _look_up(
        self, tables: Sequence[torch.Tensor], digits: torch.Tensor
    ) -> torch.Tensor:
        """Return (R, D): the decoder's output for contexts, their digits (R, c)."""
        total = tables[0].index_select(0, digits[:, 0])
        for i in range(1, len(tables)):
            total += tables[i].index_select(0, digits[:, i])
        return total.relu_() if len(tables) > 1 else total

    def project(self, encoder_out: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`logits` takes of encoder output.

        Args:
          encoder_out: (..., C).

        Returns:
          (..., J).
        """
        return self._project(encoder_out)

    def decoder_rows(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return what :meth:`logits` takes of contexts.

        Args:
          contexts: R of them, each the last c tokens; -1 for none.

        Returns:
          (R, J).
        """
        places = self.row_places(contexts)
        if len(places) == 1:
            return self.rows.narrow(0, places[0], 1).clone()
        index = torch.tensor(places, dtype=torch.int64, device=self.device)
        return self.rows.index_select(0, index)

    def row_places(self, contexts: Sequence[Context]) -> List[int]:
        """Return where the rows of contexts stand in :attr:`rows`.

        The places are right until the next call: where there is no room for a new
        context, all others are forgotten.

        Args:
          contexts: R of them, each the last c tokens; -1 for none.
        """
        try:
            return [self._places[context] for context in contexts]
        except KeyError:
            self._learn(contexts)
        return [self._places[context] for context in contexts]

    def _learn(self, contexts: Sequence[Context]) -> None:
        """Let :attr:`rows` have the row of each context."""
        known = self._places
        new = list(dict.fromkeys([y for y in contexts if y not in known]))
        if self.all_rows is not None:
            for context in new:
                digits = zip(context, self.powers)
                known[context] = sum([(y + 1) * power for y, power in digits])
            return
        if len(known) + len(new) > len(self.rows):
            known.clear()  # all are forgotten where there is no room for more
            new = list(dict.fromkeys(contexts))
            if len(new) > len(self.rows):
                self.rows = self.rows.new_empty(len(new), self.rows.size(1))
        begin, end = len(known), len(known) + len(new)
        self.rows[begin:end] = self._rows_of_contexts(new)
        known.update(zip(new, range(begin, end)))

    def _rows_of_contexts(self, contexts: Sequence[Context]) -> torch.Tensor:
        """Return (R, J), computed now."""
        tokens = torch.tensor(contexts, dtype=torch.int64, device=self.device)
        return self._rows_of(tokens.reshape(len(contexts), self.context_size) + 1)

    def rows_of_numbers(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return (R, J), as :meth:`decoder_rows`.

        Args:
          numbers: (R,), contexts as numbers: the digits, to base V + 1, are the tokens
            plus 1.
        """
        if self.all_rows is not None:
            return self.all_rows.index_select(0, numbers)
        return self._rows_of(self._digits(numbers))

    def _digits(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the digits (R, c) of contexts (R,)."""
        return torch.stack([numbers // p % self.base for p in self.powers], 1)

    def _rows_of(self, digits: torch.Tensor) -> torch.Tensor:
        """Return (R, J) for contexts, their digits (R, c)."""
        if self.tables:
            rows = self._look_up(self.tables, digits)
        else:
            rows = self.decoder(digits - 1, need_pad=False).squeeze(1)
        return self._project_rows(rows)

    def logits(
        self, frames: torch.Tensor, contexts: torch.Tensor, blank_penalty: float = 0.0
    ) -> torch.Tensor:
        """Return the joiner's logits for pairs of a frame and a context.

        A number may be missing from all logits of a pair.

        Args:
          frames: (..., J), of :meth:`project`.
          contexts: (..., J), of :meth:`decoder_rows`; broadcast against ``frames``.
          blank_penalty: It is subtracted from blank's logit.

        Returns:
          (..., V).
        """
        if self.plain_joiner:
            logits = self._output(torch.add(frames, contexts).sigmoid_())
        else:
            logits = self.joiner(frames, contexts, project_input=False)
        if blank_penalty:
            logits[..., self.blank_id] -= blank_penalty
        return logits

    def leads(self, logits: torch.Tensor, blank_penalty: float = 0.0) -> torch.Tensor:
        """Return how far the best token that is emitted is above the others, (R,).

        Args:
          logits: (R, V), of :meth:`logits`.
          blank_penalty: That which they were computed with.
        """
        if self.silent == {0}:
            emitted = logits[:, 1:].amax(-1)
            if self.plain_joiner and not blank_penalty:  # blank's logit is 0
                return emitted
            return emitted - logits.select(1, 0)
        emitted = logits.index_fill(1, self._silent_ids, float("-inf")).amax(-1)
        return emitted - logits.index_select(1, self._silent_ids).amax(-1)

    def ask_alone(
        self,
        projected: torch.Tensor,
        frame: int,
        context: Context,
        blank_penalty: float = 0.0,
    ) -> int:
        """Return the best token of one frame, computed as icefall's loop does.

        Args:
          projected: (1, T, J), the joiner's projection of this utterance alone.
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
