"""A recipe's tokens: BPE pieces or characters, their order, and maps between orders."""

import hashlib
from pathlib import Path
from typing import Any, List, Optional, Union

import torch

from icefall_kd.errors import KDError
from icefall_kd.files import replacing
from icefall_kd.tokens.characters import Characters

TOKENS = "tokens.txt"  # in a store: the teacher's tokens, one a line, in their order


def load_tokenizer(
    bpe_model: Union[str, Path], vocab_size: Optional[int] = None
) -> Any:
    """Load a recipe's tokenizer.

    Args:
      bpe_model: The recipe's ``bpe.model``, or its ``--lang-dir``: the folder of a
        ``bpe.model``, or of the ``tokens.txt`` of
        :class:`~icefall_kd.tokens.characters.Characters`.
      vocab_size: How many tokens the teacher has; None where it is not known.

    Returns:
      A sentencepiece processor, or ``Characters``, which has the same methods.

    Raises:
      KDError: The file can't be read, or it has another number of tokens than
        ``vocab_size``.
    """
    import sentencepiece as spm

    if Path(bpe_model).is_dir():
        if not (Path(bpe_model) / "bpe.model").is_file():
            return _of_size(Characters(bpe_model), bpe_model, vocab_size)
        bpe_model = Path(bpe_model) / "bpe.model"
    sp = spm.SentencePieceProcessor()
    try:
        sp.load(str(bpe_model))
    except (OSError, RuntimeError):
        raise KDError(
            f"the BPE model {bpe_model} can't be read: give --bpe-model the bpe.model "
            "that the recipe trains with"
        ) from None
    return _of_size(sp, bpe_model, vocab_size)


def _of_size(tokenizer: Any, path: Union[str, Path], vocab_size: Optional[int]) -> Any:
    """Refuse a tokenizer whose size is not the teacher's."""
    if vocab_size is not None and tokenizer.get_piece_size() != vocab_size:
        raise KDError(
            f"{path} has {tokenizer.get_piece_size()} tokens and the teacher "
            f"{vocab_size}: give the teacher's bpe.model or lang folder"
        )
    return tokenizer


def token_names(tokenizer: Any) -> List[str]:
    """Return the tokens of a tokenizer in the order of their ids.

    Args:
      tokenizer: A sentencepiece processor, or ``Characters``.
    """
    return [tokenizer.id_to_piece(i) for i in range(tokenizer.get_piece_size())]


def hash_tokens(names: List[str]) -> str:
    """Return the SHA-256 over tokens in their order.

    Args:
      names: The tokens.
    """
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def write_token_names(store: Union[str, Path], names: List[str]) -> None:
    """Write the teacher's tokens into a store.

    Args:
      store: The store's folder.
      names: The tokens in their order.
    """
    with replacing(Path(store) / TOKENS, shared=True) as temporary:
        temporary.write_text("".join(name + "\n" for name in names), "utf8")


def _read_token_names(store: Union[str, Path], tokens: str) -> Optional[List[str]]:
    path = Path(store) / TOKENS
    if not path.is_file():
        return None
    names = path.read_bytes().decode("utf8", "replace").split("\n")[:-1]
    if tokens and hash_tokens(names) != tokens:
        raise KDError(
            f"{path} is damaged: its tokens have the hash {hash_tokens(names)[:8]}, "
            f"and {tokens[:8]} was written: copy the teacher's tokens there "
            "again, one a line, or make the targets again with `icefall-kd dump "
            "--overwrite`"
        )
    return names


def token_map(
    store: Union[str, Path], student: List[str], tokens: str = ""
) -> Optional[torch.Tensor]:
    """Return the student's id of each of the teacher's tokens.

    Args:
      store: A store of targets, with the teacher's tokens in ``tokens.txt``.
      student: The student's tokens in their order.
      tokens: :func:`hash_tokens` of the teacher's tokens; "" where unknown.

    Returns:
      (V,), or None for a store without ``tokens.txt``.

    Raises:
      KDError: one of them has a token that the other lacks, or ``tokens.txt`` is
        damaged.
    """
    teacher = _read_token_names(store, tokens)
    if teacher is None:
        return None
    lacking = {
        "student": sorted(set(teacher) - set(student)),
        "teacher": sorted(set(student) - set(teacher)),
    }
    for model, names in lacking.items():
        if names:
            raise KDError(
                f"the teacher has {len(teacher)} tokens and the student "
                f"{len(student)} tokens, and the {model} lacks {names[0]!r}: train "
                "the student with the teacher's --bpe-model, or map them yourself "
                "with TargetDataset(token_ids=...)"
            )
    index = {piece: i for i, piece in enumerate(student)}
    return torch.tensor([index[piece] for piece in teacher])
