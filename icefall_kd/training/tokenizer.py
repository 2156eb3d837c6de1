"""The tokenizer of the student's recipe, loaded when it is first needed."""

from functools import cached_property
from typing import Any, Dict, List, Optional

from icefall_kd.tokens import load_tokenizer, token_names
from icefall_kd.training.online import tokens_file


class StudentTokenizer:
    """The recipe's tokenizer.

    Args:
      params: The recipe's params.

    Attributes:
      path: The recipe's ``bpe.model`` or folder of tokens; "" where there is none.
    """

    def __init__(self, params: Dict[str, Any]) -> None:
        self.path = tokens_file(params)
        self._named_path = params.get("bpe_model") or params.get("lang_dir")

    @cached_property
    def tokenizer(self) -> Any:
        """A sentencepiece processor, or
        :class:`~icefall_kd.tokens.characters.Characters`."""
        return load_tokenizer(self.path or self._named_path or "--bpe-model")

    def names(self) -> Optional[List[str]]:
        """Return the tokens in their order; None where the recipe has no file of
        them."""
        return token_names(self.tokenizer) if self.path else None

    def encode(self, texts: List[str]) -> List[List[int]]:
        """Return the token ids of each text.

        Args:
          texts: Transcripts.
        """
        return self.tokenizer.encode(texts, out_type=int)
