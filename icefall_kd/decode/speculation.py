"""Exact speculation: a draft of the tokens is checked, all frames at once.

A draft is someone's guess of the greedy path: of the model's CTC head, of a student. It
gives each frame a token or blank, and so a context. The joiner answers all frames under
these contexts in one call. Where answers and draft differ, the answers become the next
draft, and only frames whose context has changed are asked again, until nothing changes.

Then each frame's token is the joiner's answer under the tokens before it, which is what
greedy search means: by induction from the first frame, no other path is like that. A
draft can cost time, but never change the result. As a context is the last c tokens, an
error is a local matter, and all errors of a batch are mended in the same few rounds.

A CTC head has its tokens up to two frames before the transducer has them. So a token
that is not confirmed at its frame moves to the next one, in the first rounds, instead
of being dropped: then the contexts of all frames behind it stay as they are.
"""

from typing import List, Sequence, Tuple

import torch

from icefall_kd.decode.batch import MARGIN, Batch
from icefall_kd.decode.transducer import Context
from icefall_kd.decode.types import Hypothesis, SearchReport
from icefall_kd.errors import require

MOVES = 3  # frames that an unconfirmed token moves on before it is dropped
# Label looping takes over when a draft is bad: after so many rounds, or rows a frame.
MAX_ROUNDS = 12
MAX_ROWS = 3


def ctc_draft(ctc_logits: torch.Tensor, blank_id: int = 0) -> torch.Tensor:
    """Return a draft: the CTC head's best token where a run of it begins, else blank.

    Args:
      ctc_logits: (N, T, V), logits or log-probabilities.
      blank_id: The token id of blank.

    Returns:
      (N, T), token ids.
    """
    return collapsed(ctc_logits.argmax(-1), blank_id)


def collapsed(best: torch.Tensor, blank_id: int) -> torch.Tensor:
    """Return the tokens (N, T) of frames, blank where they repeat the frame before.

    Args:
      best: (N, T), token ids.
      blank_id: The token id of blank.
    """
    again = torch.zeros_like(best, dtype=torch.bool)
    again[:, 1:] = best[:, 1:] == best[:, :-1]
    return best.masked_fill(again, blank_id)


def draft_of(
    hypotheses: Sequence[Hypothesis], num_frames: int, blank_id: int = 0
) -> torch.Tensor:
    """Return a draft: the tokens of hypotheses, such as a student's, at their frames.

    Args:
      hypotheses: One for each utterance, with frames of this length in seconds. Of
        tokens at the same frame the last stays; those beyond the frames are left out.
      num_frames: T.
      blank_id: The token id of blank.

    Returns:
      (N, T), token ids.
    """
    rows = []
    for hypothesis in hypotheses:
        row = [blank_id] * num_frames
        for token, frame in zip(hypothesis.tokens, hypothesis.frames):
            if 0 <= frame < num_frames:
                row[frame] = token
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), num_frames)


class Speculation:
    """A draft of a batch, mended round by round until it is the greedy path.

    All tensors have one entry for each valid frame, utterance behind utterance (F).

    Args:
      batch: The projected frames of a batch.
      contexts: The last tokens before each utterance's first frame.
      draft: (N, T), token ids.
      report: Where the cost is counted.

    Raises:
      KDError: The draft has token ids that the model has not, or too few utterances.
    """

    def __init__(
        self,
        batch: Batch,
        contexts: Sequence[Context],
        draft: torch.Tensor,
        report: SearchReport,
    ) -> None:
        self.batch, self.report = batch, report
        self.transducer = transducer = batch.transducer
        lengths, device = batch.lengths, batch.frames.device
        self.num_frames, self.blank_id = sum(lengths), transducer.blank_id
        self.powers, self.base = transducer.powers, transducer.base
        c = transducer.context_size
        # The rows of the batch that have frames, one for each `utterance`.
        self.rows_of_batch = [n for n, length in enumerate(lengths) if length]
        self.first = batch.tensor([batch.begins[n] for n in self.rows_of_batch])
        self.utterance = torch.repeat_interleave(
            torch.arange(len(self.first), device=device),
            batch.tensor([lengths[n] for n in self.rows_of_batch]),
        )
        before = [contexts[n] for n in self.rows_of_batch]
        self.before = batch.tensor(before).reshape(-1, c)
        self.tokens = self._flatten(draft.to(device), lengths)  # the draft
        drafted = self.tokens != self.blank_id
        self.answers = torch.full_like(self.tokens, self.blank_id)
        self.asked_contexts = torch.full_like(self.tokens, -1)  # one a frame
        self.sure = torch.zeros_like(drafted)
        self.log_probs = torch.zeros(self.num_frames, device=device)
        self.may_end = torch.zeros_like(drafted)  # the last frame of an utterance
        self.may_end[self.first[1:] - 1] = True
        self.may_end[-1:] = True

    def _flatten(self, draft: torch.Tensor, lengths: List[int]) -> torch.Tensor:
        """Return the draft of each valid frame (F,), blank where it has none."""
        require(
            draft.dim() == 2 and draft.size(0) == len(lengths),
            f"`draft` is {tuple(draft.shape)}, and there are {len(lengths)} "
            "utterances: give one row of tokens for each",
        )
        longest = max(lengths, default=0)
        if draft.size(1) < longest:
            missing = longest - draft.size(1)
            draft = torch.nn.functional.pad(draft, (0, missing), value=self.blank_id)
        flat = torch.cat([row[:n] for row, n in zip(draft, lengths)])
        if len(flat):
            low, high = (int(x) for x in torch.aminmax(flat))
            require(
                0 <= low and high < self.transducer.vocab_size,
                f"`draft` has token ids {low} to {high}, and the model has "
                f"{self.transducer.vocab_size} tokens: take the draft of a model "
                "with the same tokens",
            )
        return self._silenced(flat)

    def _silenced(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return ``tokens`` with blank in place of all that are not emitted."""
        for token in self.transducer.silent - {self.blank_id}:
            tokens = tokens.masked_fill(tokens == token, self.blank_id)
        return tokens

    def contexts(self) -> torch.Tensor:
        """Return the number of each frame's context (F,) under the tokens of now.

        The tokens of all utterances stand in one row, each utterance's behind its
        first context. So the c tokens before a frame are neighbours in that row.
        """
        c = len(self.powers)
        emitted = self.tokens != self.blank_id
        earlier = emitted.cumsum(0) - emitted.long()  # tokens before, of all utterances
        place = earlier + c * self.utterance  # of the first one of the context
        row = place.new_zeros(self.num_frames + c * len(self.first) + 1)
        dump = len(row) - 1
        row[torch.where(emitted, place + c, dump)] = self.tokens + 1
        steps = torch.arange(c, device=row.device)
        row[place[self.first].unsqueeze(1) + steps] = self.before + 1
        number = row[place] * self.powers[0]
        for i in range(1, c):
            number += row[place + i] * self.powers[i]
        return number

    def run(self) -> bool:
        """Mend the draft until it is the path; False if label looping is to go on."""
        drafted = self.tokens
        done = self._mend()
        is_token = drafted != self.blank_id
        self.report.drafted += int(is_token.sum())
        self.report.accepted += int((is_token & (drafted == self.answers)).sum())
        return done

    def _mend(self) -> bool:
        """Ask and mend in rounds; False if that takes too many of them."""
        while self.num_frames:
            contexts = self.contexts()
            todo = (contexts != self.asked_contexts).nonzero()[:, 0]
            if len(todo):
                rows = self.report.joiner_rows + len(todo)
                most = MAX_ROWS * self.num_frames
                if self.report.rounds == MAX_ROUNDS or rows > most:
                    return False
                self._ask(todo, contexts[todo])
                self.tokens = self._mended()
            elif not torch.equal(self.tokens, self.answers):
                self.tokens = self.answers.clone()
            elif self._are_sure(contexts):
                break
        return True

    def _ask(self, todo: torch.Tensor, contexts: torch.Tensor) -> None:
        """Ask the joiner some frames under their contexts."""
        report, transducer = self.report, self.transducer
        # Neighbours share a context.
        different, row_of_frame = torch.unique_consecutive(
            contexts, return_inverse=True
        )
        rows = transducer.rows_of_numbers(different)
        report.rounds += 1
        report.joiner_rows += len(todo)
        report.decoder_rows += len(different)
        best = []
        chunk = self.batch.chunk
        for places, row_of_place in zip(todo.split(chunk), row_of_frame.split(chunk)):
            frames = self.batch.frames.index_select(0, places)
            contexts_rows = rows.index_select(0, row_of_place)
            best.append(self.batch.best_two(frames, contexts_rows))
        values, tokens = (torch.cat(x) for x in zip(*best))
        self.answers[todo] = self._silenced(tokens[:, 0])
        self.log_probs[todo] = values[:, 0]
        self.sure[todo] = values[:, 0] - values[:, 1] > MARGIN  # false for NaN
        self.asked_contexts[todo] = contexts

    def _mended(self) -> torch.Tensor:
        """Return the next draft: the answers, and unconfirmed tokens a frame later."""
        if self.report.rounds > MOVES:
            return self.answers.clone()
        blank = self.blank_id
        silent = self.answers == blank
        # A token that the context ends with was found a frame earlier: it is dropped.
        last = self.asked_contexts % self.base - 1
        lost = silent & (self.tokens != last) & ~self.may_end
        moved = torch.full_like(self.tokens, blank)
        moved[1:] = self.tokens.masked_fill(~lost, blank)[:-1]
        free = silent & (self.tokens == blank)
        return torch.where(free, moved, self.answers)

    def _are_sure(self, contexts: torch.Tensor) -> bool:
        """Ask frames with a small margin alone; False if an answer has changed."""
        before = self.answers.clone()
        for frame in (~self.sure).nonzero()[:, 0].tolist():
            token = self.batch.ask_alone(
                self.rows_of_batch[int(self.utterance[frame])],
                frame,
                self._context(contexts[frame]),
            )
            self.report.asked_again += 1
            self.answers[frame] = (
                self.blank_id if token in self.transducer.silent else token
            )
            self.sure[frame] = True
        return torch.equal(before, self.answers)

    def _context(self, number: torch.Tensor) -> Context:
        powers, base = self.powers, self.base
        return tuple(int(number) // power % base - 1 for power in powers)

    def known(self) -> List[Tuple[int, Hypothesis]]:
        """Return for each row up to which place its path is right, and the path."""
        right = self.tokens == self.answers
        right &= self.sure & (self.contexts() == self.asked_contexts)
        right, tokens = right.tolist(), self.answers.tolist()
        log_probs, rows = self.log_probs.tolist(), []
        for begin, n in zip(self.batch.begins, self.batch.lengths):
            place, hypothesis = begin, Hypothesis()
            while place < begin + n and right[place]:
                if tokens[place] != self.blank_id:
                    hypothesis.tokens.append(tokens[place])
                    hypothesis.frames.append(place)
                    hypothesis.log_probs.append(log_probs[place])
                place += 1
            rows.append((place, hypothesis))
        return rows
