"""A language model of a few thousand weights that has learned nothing: what the examples run with under `--tiny`.

Its answers mean nothing. It is there to show that a script runs, on any machine, without a network, in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

DATA = Path(__file__).parent / "data"


def load_tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a Llama with two layers, the same at every call, and a tokenizer made from the texts in `data`."""
    tokenizer = _train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer


def _train_tokenizer() -> PreTrainedTokenizerBase:
    lines = [line for path in sorted(DATA.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [value for line in lines for value in json.loads(line).values() if isinstance(value, str)]
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    byte_pairs.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return FastTokenizer(
        tokenizer_object=byte_pairs, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
