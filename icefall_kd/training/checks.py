"""What a session refuses of options and stores before it trains."""

from typing import Any, Dict

from icefall_kd.errors import KDError, require
from icefall_kd.files import check_new_folder


def check_online(params: Dict[str, Any], joint: Any, online: bool) -> None:
    """Refuse options of a teacher in the training process that don't fit.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      online: Whether there is such a teacher.

    Raises:
      KDError: a width that no path gets through, clean features or a cache without a
        teacher, or a cache for targets other than CTC targets and simple targets.
    """
    from icefall_kd.kinds.codec import Codec
    from icefall_kd.lattice import check_s_range

    check_s_range(params["kd_teacher_s_range"])
    require(
        online or not params["kd_teacher_clean"],
        "--kd-teacher-clean is true and there is no teacher to run: give "
        "--kd-teacher-exp-dir, or leave it out, as stored targets are of clean "
        "features",
    )
    cache = params["kd_teacher_cache_dir"]
    if not cache:
        return
    require(
        online,
        f"--kd-teacher-cache-dir is {cache} and there is no teacher to run: give "
        "--kd-teacher-exp-dir",
    )
    for term in joint.terms.values():
        require(
            not {"lattice", "hidden"} & set(term.kinds),
            "--kd-teacher-cache-dir stores CTC targets and simple targets, and "
            f"{term.parameter('weight')} needs more: dump the targets with `icefall-kd "
            "dump --keep-lattice` and --keep-hidden, or run the teacher without a "
            "cache",
        )
    check_new_folder(cache, "--kd-teacher-cache-dir")
    codec = Codec.parse(params["kd_teacher_keep"])
    joint.condition.check_form(codec)
    for name in ("ctc", "simple"):
        if name in joint.terms:
            codec.check_temperature(joint.terms[name].temperature)


def check_best_path(
    params: Dict[str, Any], joint: Any, fingerprint: Any, store: str
) -> None:
    """Refuse a store of whole lattices where the option is for the best path alone.

    Args:
      params: The recipe's params.
      joint: The joint loss.
      fingerprint: The store's.
      store: Its folder.

    Raises:
      KDError: ``--kd-teacher-path-only`` and lattices that hold all nodes.
    """
    if not params["kd_teacher_path_only"] or "lattice" not in joint.kinds:
        return
    if not fingerprint.kinds["lattice"].codec.path:
        raise KDError(
            f"--kd-teacher-path-only is true and the store {store} keeps its lattices "
            f"as {fingerprint.lattice}, all nodes of them: dump with --keep-lattice "
            f"path:{fingerprint.lattice}, or give --kd-teacher-path-only false"
        )


def check_lattices_stay(joint: Any, difference: str, store: str) -> None:
    """Refuse lattice terms where targets are rearranged, and lattices can't be.

    Args:
      joint: The joint loss.
      difference: What differs between student and teacher.
      store: The store's folder.

    Raises:
      KDError: a term reads lattices.
    """
    terms = [term for term in joint.terms.values() if "lattice" in term.kinds]
    weights = " and ".join(term.parameter("weight") for term in terms)
    require(
        not terms,
        f"{difference} of student and teacher differ, and the lattices of {store} "
        "can't be rearranged as CTC targets can: dump the targets of a teacher that "
        f"has the student's, or set {weights} to 0",
    )


def check_ranges(joint: Any, online: bool) -> None:
    """Refuse stored ranges where no stored lattices come with the batches.

    Args:
      joint: The joint loss.
      online: Whether a teacher runs in the training process.

    Raises:
      KDError: it does, or no term reads lattices.
    """
    reason = "no term reads lattices"
    if online:
        reason = "the teacher runs in the training process"
    require(
        not online and "lattice" in joint.kinds,
        "--kd-stored-ranges true takes the ranges of stored lattices, and "
        f"{reason}: dump the targets with `icefall-kd dump --keep-lattice`, and give "
        "--kd-rnnt-weight a value",
    )
