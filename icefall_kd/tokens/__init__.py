from icefall_kd.tokens.tokenizer import (
    TOKENS,
    hash_tokens,
    load_tokenizer,
    token_map,
    token_names,
    write_token_names,
)

__all__ = [
    "TOKENS",
    "hash_tokens",
    "load_tokenizer",
    "token_map",
    "token_names",
    "write_token_names",
]
