"""A byte-level tokenizer: one token a byte, and BOS before the text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from epfuse.demo.text import BOS

BOS_TOKEN = "<bos>"


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in the ByteLevel pre-tokenizer (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def save_tokenizer(directory: Path) -> None:
    """The files that transformers and vLLM load."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())} | {BOS_TOKEN: BOS}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A $B", special_tokens=[(BOS_TOKEN, BOS)]
    )
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS_TOKEN).save_pretrained(directory)
