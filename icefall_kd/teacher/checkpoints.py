"""The files of a training's checkpoints, as icefall's decode.py takes them."""

import importlib
import logging
import pickle
from contextlib import nullcontext
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any, Dict, List, Optional, Union

import torch

from icefall_kd.errors import KDError, first_line, require


def averaging_module() -> ModuleType:
    """icefall's functions that find and average checkpoints."""
    for name in ("icefall.checkpoint", "zipformer.utils.checkpoint"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
        except Exception as e:  # such as k2's OSError for a library that is missing
            raise KDError(
                f"{name} can't be imported ({first_line(e)}): mend its "
                "installation until `python -c 'import icefall'` works"
            ) from None
    raise KDError(
        "neither icefall nor the package zipformer can be imported: put icefall on "
        "PYTHONPATH, or run `pip install zipformer==0.1.3`"
    )


def checkpoint_files(
    exp_dir: Union[str, Path], epoch: int, iteration: int, avg: int, averaged: bool
) -> List[Path]:
    """The files that icefall's decode.py takes for these options.

    Args:
      exp_dir: The experiment folder.
      epoch: N of ``epoch-N.pt``.
      iteration: N of ``checkpoint-N.pt``, taken in place of the epoch; 0 for none.
      avg: The number of checkpoints to average.
      averaged: Whether to average all steps between two checkpoints.

    Returns:
      One file to load as it is, [start, end] for the averaged model between two
      checkpoints, or ``avg`` files to average.

    Raises:
      KDError: a file that is not there.
    """
    exp_dir = Path(exp_dir)
    require(avg >= 1, f"`avg` is {avg}, and must be 1 or more")
    if iteration > 0:
        # The function that decode.py calls, so that both take the same files.
        find_checkpoints = averaging_module().find_checkpoints
        newest_first = find_checkpoints(exp_dir, iteration=-iteration)
        count = avg + 1 if averaged else avg
        require(
            len(newest_first) >= count,
            f"{exp_dir} has {len(newest_first)} checkpoint-N.pt up to {iteration}, and "
            f"`iteration` {iteration} `avg` {avg} need {count}: lower `avg`, or "
            "train with a smaller --save-every-n",
        )
        files = [Path(name) for name in reversed(newest_first[:count])]
        files = [files[0], files[-1]] if averaged else files
    elif avg == 1 and not averaged:
        files = [exp_dir / f"epoch-{epoch}.pt"]
    elif averaged:
        files = [exp_dir / f"epoch-{epoch - avg}.pt", exp_dir / f"epoch-{epoch}.pt"]
    else:
        files = [exp_dir / f"epoch-{e}.pt" for e in range(epoch - avg + 1, epoch + 1)]
    remedy = "mend `exp_dir`, `epoch`, `iteration` or `avg`"
    if epoch == iteration == 0:
        remedy = "give `epoch` or `iteration`"
    elif averaged and not files[0].is_file() and files[-1].is_file():
        remedy = (
            f"averaging needs it beside {files[-1].name}; give `use_averaged_model` 0 "
            "and `avg` 1 for that one as it is"
        )
    for path in files:
        require(path.is_file(), f"the checkpoint {path} does not exist: {remedy}")
    return files


def _load_data(path: Path) -> Optional[Dict[str, Any]]:
    """Load without running pickled code; None where torch can't do so."""
    safe = getattr(torch.serialization, "safe_globals", None)  # from torch 2.5 on
    try:
        with safe([type(path), PosixPath]) if safe else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None


def load_checkpoint(path: Path) -> Dict[str, Any]:
    """The dictionary of a checkpoint, on the CPU.

    Args:
      path: The file.

    Raises:
      KDError: a file that can't be read, or that holds no dictionary.
    """
    try:
        checkpoint = _load_data(path)
        if checkpoint is None:
            logging.warning(
                f"{path} holds more than data, so loading it runs what was pickled "
                "into it: use checkpoints of people you trust only"
            )
            checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as e:  # torch raises many kinds for a damaged file
        raise KDError(
            f"the checkpoint {path} can't be read ({type(e).__name__}): copy or train "
            "it again"
        ) from None
    require(
        isinstance(checkpoint, dict),
        f"the checkpoint {path} holds a {type(checkpoint).__name__}, not a dict with a "
        "model: give the epoch-N.pt or checkpoint-N.pt of a training",
    )
    return checkpoint


def averages_until(checkpoint: Dict[str, Any], period: Any) -> int:
    """How often the averaged model was updated until a checkpoint, as icefall counts.

    Args:
      checkpoint: Its dictionary; 0 where the number of steps is not in it.
      period: The steps from one update to the next, the ``average_period`` of the
        checkpoint from which on icefall averages.
    """
    numbers = (checkpoint.get("batch_idx_train"), period)
    steps, period = (x if isinstance(x, int) and x > 0 else 0 for x in numbers)
    return steps // (period or 1)
