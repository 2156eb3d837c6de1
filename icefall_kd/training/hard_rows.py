"""The recipe's losses of the rows that have transcripts, in a batch that mixes both.

The recipe's model adds its losses up over the whole batch. It calls them by their
module's name, ``k2.rnnt_loss_pruned(...)`` and ``torch.nn.functional.ctc_loss(...)``.
Hooks of modules don't get these calls, and the model is not edited: so the functions in
these modules are replaced, from ``kd.begin(batch)`` until the model is done. The
replaced functions compute the loss of each row, and leave out the rows whose transcript
only stands in.
"""

from functools import wraps
from inspect import signature
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from icefall_kd.errors import KDError, require
from icefall_kd.rnnt import get_engine
from icefall_kd.targets.stand_in import transcribed_rows
from icefall_kd.zipformer import has_transducer

TRANSDUCER = ("rnnt_loss_smoothed", "rnnt_loss_simple", "rnnt_loss_pruned", "rnnt_loss")
REMEDY = (
    "label the cuts that have none (`icefall-kd label`), or sample them apart, as "
    "lhotse's RoundRobinSampler does"
)


class HardRows:
    """Leaves rows without transcripts out of the recipe's losses, batch by batch.

    What a recipe adds without a transcript, as the consistency loss of CR-CTC, stays.

    Args:
      model: The student.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.attends = getattr(model, "attention_decoder", None) is not None
        self.transduces = has_transducer(model)
        self._replaced: List[Tuple[Any, str, Callable]] = []
        self._rows: Optional[torch.Tensor] = None  # (N,), of a batch that mixes both
        self._begun, self._calls = False, 0

    def begin(self, batch: Dict[str, Any]) -> None:
        """Prepare the next forward pass.

        Args:
          batch: Its batch.

        Raises:
          KDError: A batch that mixes both, for a model with an attention decoder.
        """
        self.close()  # the last batch's forward pass may have failed
        self._begun = True
        rows = transcribed_rows(batch)
        if rows is None or not rows.any():
            return
        require(
            not self.attends,
            "a batch has cuts with and without transcripts, and the loss of the "
            f"student's attention decoder is of a whole batch: {REMEDY}",
        )
        self._rows, self._calls = rows, 0
        places = [(torch.nn.functional, "ctc_loss")]
        if self.transduces:
            engine = get_engine()
            places += [(engine, name) for name in TRANSDUCER if hasattr(engine, name)]
        for module, name in places:
            function = getattr(module, name)
            self._replaced.append((module, name, function))
            setattr(module, name, self._of_rows(function))

    def take(self, batch: Dict[str, Any]) -> None:
        """End the forward pass.

        Args:
          batch: Its batch.

        Raises:
          KDError: A batch that mixes both, whose losses were not seen.
        """
        rows = transcribed_rows(batch)
        mixes = rows is not None and bool(rows.any())
        begun, calls = self._begun, self._calls
        self.close()
        require(
            begun or not mixes,
            "a batch has cuts with and without transcripts, and compute_loss() does "
            "not call kd.begin(batch) before it reads the batch: plug the recipe again "
            "with `icefall-kd plug`",
        )
        require(
            calls or not mixes,
            "a batch has cuts with and without transcripts, and the recipe calls none "
            f"of the losses that can be told apart by rows: {REMEDY}",
        )

    def close(self) -> None:
        """Undo what :meth:`begin` did."""
        for module, name, function in self._replaced:
            setattr(module, name, function)
        self._replaced, self._rows = [], None
        self._begun, self._calls = False, 0

    def _of_rows(self, function: Callable) -> Callable:
        """A loss function that leaves out rows."""
        parameters = signature(function)

        @wraps(function)
        def of_rows(*args: Any, **kwargs: Any) -> Any:
            given = parameters.bind(*args, **kwargs)
            given.apply_defaults()
            reduction = given.arguments["reduction"]
            if reduction not in ("none", "sum"):
                raise KDError(
                    f"the recipe's loss {function.__name__} has reduction={reduction} "
                    "and a batch has cuts with and without transcripts, which takes "
                    f"'sum' or 'none': {REMEDY}"
                )
            given.arguments["reduction"] = "none"
            found = function(*given.args, **given.kwargs)
            loss, more = (
                (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
            )
            copies = len(loss) // len(self._rows)  # 2 with CR-CTC
            rows = self._rows.to(loss.device).repeat(copies)
            loss = torch.where(rows, loss, torch.zeros_like(loss))
            loss = loss.sum() if reduction == "sum" else loss
            self._calls += 1
            return (loss, *more) if more else loss

        return of_rows
