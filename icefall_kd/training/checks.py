"""What a session refuses before it trains, and what it goes on without."""

import logging
from typing import Any, Dict

from icefall_kd.errors import KDError
from icefall_kd.files import check_new_folder
from icefall_kd.zipformer import has_ctc, has_transducer

MEANS = ("mean_u", "total")  # forms that need dense lattices


def leave_out_heads(joint, model) -> None:
    """Switch off the terms of heads that the student lacks."""
    ctc = (has_ctc(model), "CTC head (--use-ctc 1)")
    transducer = (has_transducer(model), "transducer (--use-transducer 1)")
    for name, heads in (
        ("ctc", (ctc,)),
        ("rnnt", (transducer, ctc) if joint.is_total else (transducer,)),
        ("full_sum", (transducer,)),
    ):
        lacking = [head for there, head in heads if not there]
        if name not in joint.terms or not lacking:
            continue
        joint.switch_off(name)
        if not joint.terms:
            raise KDError(
                f"--kd-{name.replace('_', '-')}-weight is above 0 and the student has "
                f"no {lacking[0]}: train it with one, or give another term a weight"
            )
        logging.warning(
            f"The term kd_{name}_loss is off: the student has no {lacking[0]}"
        )


def check_online(params: Dict[str, Any], joint, asked: bool) -> None:
    """Refuse options of an online teacher that don't fit.

    Args:
      asked: Whether there is one.
    """
    from icefall_kd.kinds.codec import Codec
    from icefall_kd.lattice import check_s_range

    check_s_range(params["kd_s_range"], "--kd-s-range")
    cache = params["kd_cache_dir"]
    if not cache:
        return
    if not asked:
        raise KDError(
            f"--kd-cache-dir is {cache} and there is no teacher to ask: give "
            "--kd-teacher-exp-dir"
        )
    for name in ("rnnt", "full_sum", "hidden"):
        if name in joint.terms:
            raise KDError(
                f"--kd-cache-dir keeps CTC targets, and --kd-{name.replace('_', '-')}"
                "-weight needs more: dump the targets with `icefall-kd dump "
                "--keep-lattice` and --keep-hidden, or ask the teacher without a cache"
            )
    check_new_folder(cache, "--kd-cache-dir")
    Codec.parse(params["kd_keep"]).check_temperature(joint.temperature)


def check_kept(joint, found, store: str) -> None:
    """Refuse a store that lacks what the loss asks for.

    Args:
      found: The store's fingerprint.
    """
    ctc, lattice = found.codecs()
    for name, needed, codec, remedy in (
        ("CTC targets", joint.needs_ctc_targets, ctc, "--keep dense"),
        ("lattices", joint.needs_lattice, lattice, "--keep-lattice collapsed"),
    ):
        if needed and codec is None:
            raise KDError(
                f"the store {store} keeps no {name}, and a KD weight above 0 needs "
                f"them: dump with {remedy}, or set that weight to 0"
            )
    if joint.needs_ctc_targets:
        ctc.check_temperature(joint.temperature)
    if "rnnt" in joint.terms:
        lattice.check_temperature(joint.temperature)
        if joint.rnnt_form in MEANS:
            sparse_lattice = lattice.nodes is None or lattice.nodes.kind != "dense"
            if sparse_lattice or (joint.is_total and ctc.kind != "dense"):
                raise KDError(
                    f"the store {store} keeps its CTC targets as {found.ctc or 'none'} "
                    f"and its lattices as {found.lattice}, and --kd-rnnt-form "
                    f"{joint.rnnt_form} takes means over all symbols: dump with --keep "
                    "dense --keep-lattice dense"
                )
    if "full_sum" in joint.terms:
        try:
            lattice.check_temperature(1.0)
        except KDError:
            raise KDError(
                f"the store {store} keeps its lattices as {found.lattice}, and "
                "--kd-full-sum-weight needs them at temperature 1, whatever "
                "--kd-temperature is: dump with --keep-lattice dense or collapsed"
            ) from None


def check_path(params: Dict[str, Any], joint, fingerprint, store: str) -> None:
    """Refuse a store of whole lattices where the best path alone is asked for.

    Args:
      params: The recipe's own.
      joint: The joint loss.
      fingerprint: The store's.
      store: Its folder.

    Raises:
      KDError: ``--kd-path-only`` and lattices that keep all nodes.
    """
    _, lattice = fingerprint.codecs()
    if params["kd_path_only"] and joint.needs_lattice and not lattice.path:
        raise KDError(
            f"--kd-path-only is {params['kd_path_only']} and the store {store} keeps "
            f"its lattices as {fingerprint.lattice}, all nodes of them: dump with "
            f"--keep-lattice path:{fingerprint.lattice}, or give --kd-path-only 0"
        )


def check_lattices_stay(joint, what: str, store: str) -> None:
    """Refuse lattice terms where targets are rearranged, and lattices can't be.

    Args:
      what: What differs between student and teacher.
    """
    if joint.needs_lattice:
        raise KDError(
            f"{what} of student and teacher differ, and the lattices of {store} can't "
            "be rearranged as CTC targets can: dump the targets of a teacher that has "
            "the student's, or set --kd-rnnt-weight and --kd-full-sum-weight to 0"
        )


def check_ranges(joint, asked: bool) -> None:
    """Refuse teacher-guided pruning where no stored lattices come with the batches."""
    if asked or not joint.needs_lattice:
        raise KDError(
            "--kd-teacher-ranges 1 takes the ranges of stored lattices, and "
            f"{'the teacher is asked online' if asked else 'no term reads lattices'}: "
            "dump the targets with `icefall-kd dump --keep-lattice`, and give "
            "--kd-rnnt-weight a value"
        )
