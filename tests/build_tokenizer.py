"""A word-level tokenizer small enough to read: every word with and without a blank in front of it.

`python tests/build_tokenizer.py` writes it to `tests/assets/tokenizer`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ASSETS = Path(__file__).parent / "assets"
FOLDER = ASSETS / "tokenizer"
WORDS = ASSETS / "words.txt"

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = ("\n\n", "\n", " ", *".,:;!?'\"()-/", *"0123456789")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; text made of its words, and of its words only, survives encoding and decoding."""
    words = WORDS.read_text(encoding="utf-8").split()
    tokens = (*SPECIAL_TOKENS, *CHARACTERS, *words, *(f" {word}" for word in words))
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n| ?\p{L}+|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    build_tokenizer().save_pretrained(FOLDER)
