"""Texts of any teacher as a student's: rules from a file, and what its tokens lack."""

import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Any, Callable, List

from icefall_kd.errors import KDError, require
from icefall_kd.tokens.characters import Characters

STEPS = {
    "lower": str.lower,
    "upper": str.upper,
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
}


class TextRules:
    """Rewrites texts, step by step, by the lines of a file.

    A line is one of the words ``lower``, ``upper``, ``nfc`` and ``nfkc``, or a regular
    expression of Python's ``re``, a tab, and what replaces each match; nothing behind
    the tab removes it. Empty lines, and those that begin with ``#``, say nothing. At
    the end each run of blanks becomes one blank, and none is left at the ends.

    Args:
      path: The file, in UTF-8; "" for no rules.

    Raises:
      KDError: a file that can't be read, or a line that is no rule.
    """

    def __init__(self, path: str = "") -> None:
        self.steps: List[Callable[[str], str]] = []
        self.digest = ""
        if not path:
            return
        try:
            data = Path(path).read_bytes()
            lines = data.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise KDError(
                f"the rules {path} can't be read ({type(e).__name__}): give a file of "
                "lines in UTF-8"
            ) from None
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                self.steps.append(_step(line, f"line {number} of the rules {path}"))

    def __call__(self, text: str) -> str:
        """Rewrite a text.

        Args:
          text: Any.
        """
        for step in self.steps:
            text = step(text)
        return " ".join(text.split())


def _step(line: str, place: str) -> Callable[[str], str]:
    pattern, tab, replacement = line.partition("\t")
    if not tab:
        require(
            line.strip() in STEPS,
            f"{place} is {line[:60]!r}, and must be one of {', '.join(STEPS)}, or a "
            "regular expression, a tab and what replaces it",
        )
        return STEPS[line.strip()]
    try:
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")
    except (re.error, IndexError) as e:
        raise KDError(
            f"{place} can't be used ({e}): give a regular expression of Python's re, a "
            "tab and what replaces it"
        ) from None
    return lambda text: compiled.sub(replacement, text)


def unknown_parts(tokenizer: Any, text: str) -> List[str]:
    """The parts of a text that a student's tokens can't write.

    Args:
      tokenizer: The student's: a sentencepiece processor, or ``Characters``.
      text: The text.
    """
    if isinstance(tokenizer, Characters):
        names = set(tokenizer.names)
        return sorted({c for c in text if c not in " \t" and c not in names})
    ids = tokenizer.encode(text, out_type=int)
    if tokenizer.unk_id() not in ids:
        return []
    tokens = tokenizer.encode(text, out_type=str)
    return sorted({t for t, i in zip(tokens, ids) if i == tokenizer.unk_id()})
