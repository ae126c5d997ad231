"""Tokenizers that lie beside weights, held against the embedding table that their ids go to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from stages.errors import UserError


def read_tokenizer(folder: Path, network: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, for a network with this configuration (CLAP's, T5's or VITS's).

    Raises UserError when there is none, or it does not fit the network.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no tokenizer could be read in {folder}; expected the one that the weights beside it were trained with") from error
    text = getattr(network, "text_config", network)
    if problem := misfit(tokenizer, text.vocab_size, getattr(text, "pad_token_id", None)):
        raise UserError(f"the tokenizer in {folder} is not that of the weights beside it: {problem}")
    return tokenizer


def misfit(tokenizer: PreTrainedTokenizerBase, rows: int, padding: int | None) -> str | None:
    """Why ids of this tokenizer would be wrong, or out of range, in a table of `rows` embeddings that pads with id `padding`.

    Fewer tokens than rows are no fault: T5's table has 28 rows to spare. RoBERTa counts positions by the padding's id.
    """
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        return f"it has {tokens} tokens, the network knows {rows}"
    if padding is not None and tokenizer.pad_token_id != padding:
        return f"it pads with token {tokenizer.pad_token_id}, the network with {padding}"
    return None
