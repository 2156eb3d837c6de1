"""The tokenizer of a recipe of characters, with sentencepiece's method names."""

import re
from pathlib import Path
from typing import List, Sequence, Union

from icefall_kd.errors import KDError

UNKNOWN = "<unk>"


class Characters:
    """Turns a text into characters, as icefall's ``CharCtcTrainingGraphCompiler`` does.

    Each character is a token; blanks and tabs are left out, and a character that
    ``tokens.txt`` lacks is ``<unk>``.

    Args:
      lang_dir: The folder of ``tokens.txt``, a token and its id on each line.

    Raises:
      KDError: a file that can't be read, or ids that don't run from 0 on.
    """

    def __init__(self, lang_dir: Union[str, Path]) -> None:
        path = Path(lang_dir) / "tokens.txt"
        try:
            lines = path.read_text("utf8").split("\n")
            rows = [line.split() for line in lines if line.strip()]
            tokens = {int(token_id): token for token, token_id in rows}
        except (OSError, ValueError) as e:
            raise KDError(
                f"{path} can't be read ({type(e).__name__}): give --lang-dir the "
                "folder that the recipe trains with, whose tokens.txt has a token "
                "and its id on each line"
            ) from None
        # The tokens of decoding graphs, #0 and on, are no outputs of a model.
        tokens = {i: x for i, x in tokens.items() if not re.fullmatch(r"#\d+", x)}
        self.names = [tokens.get(i, "") for i in range(len(tokens))]
        if "" in self.names:
            raise KDError(
                f"{path} has {len(tokens)} tokens and lacks {self.names.index('')}: "
                "give --lang-dir the folder that the recipe trains with"
            )
        self.path = path
        self._ids = {name: i for i, name in enumerate(self.names)}

    def get_piece_size(self) -> int:
        """Return V, the number of tokens."""
        return len(self.names)

    def id_to_piece(self, index: int) -> str:
        """Return a token.

        Args:
          index: Its id.
        """
        return self.names[index]

    def piece_to_id(self, piece: str) -> int:
        """Return a token's id; that of ``<unk>`` for an unknown one.

        Args:
          piece: The token.
        """
        return self._ids[piece] if piece in self._ids else self.unk_id()

    def unk_id(self) -> int:
        """Return the id of ``<unk>``."""
        if UNKNOWN not in self._ids:
            raise KDError(
                f"{self.path} lacks {UNKNOWN}, and labels of characters need it: give "
                "--lang-dir the folder that the recipe trains with"
            )
        return self._ids[UNKNOWN]

    def encode(
        self, texts: Union[str, Sequence[str]], out_type: type = int
    ) -> Union[List[int], List[List[int]]]:
        """Return the labels of a text, or of each of several.

        Args:
          texts: A text, or a list of texts.
          out_type: For sentencepiece's sake; labels are ids.
        """
        if isinstance(texts, str):
            return [self.piece_to_id(c) for c in re.sub("[ \t]", "", texts)]
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence) -> Union[str, List[str]]:
        """Return the text of labels, with a blank between the tokens.

        Args:
          ids: Labels, or a list of lists of labels, which gives a list of texts.
        """
        if ids and not isinstance(ids[0], int):
            return [self.decode(row) for row in ids]
        return " ".join(self.names[i] for i in ids)
