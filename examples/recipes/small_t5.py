"""Pretrain a small T5 from nothing with span corruption, where no pretrained encoder-decoder can be had.

python examples/recipes/small_t5.py my-texts outputs/small-t5

What comes out, after half an hour of one core, is a language model in name: it has read some two million tokens, where
T5 read a trillion. It shows that an encoder-decoder goes through both stages and the evaluation, and what a distiller
does for a base model that hardly learns from demonstrations; its scores say nothing about T5.
"""

from __future__ import annotations

import argparse
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from mend_hf.data.text import load_texts

# Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020, arXiv 1910.10683, section 3.1.4.
NOISE_DENSITY, MEAN_SPAN_TOKENS = 0.15, 3
NUM_SENTINELS = 100
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(NUM_SENTINELS))]


class Corrupted(Dataset[dict[str, list[int]]]):
    """Windows of a text with spans cut out; row i is the same at every reading, so that a stopped run goes on.

    Args:
        ids: The whole text.
        sentinels: Ids of `<extra_id_0>` and so on.
        end: Id of `</s>`.
        num_rows: How many there are.
        num_tokens: Tokens of a window, before it is corrupted.
    """

    def __init__(
        self, ids: list[int], sentinels: list[int], end: int, *, num_rows: int, num_tokens: int = 128
    ) -> None:
        self._ids, self._sentinels, self._end = ids, sentinels, end
        self._num_rows, self._num_tokens = num_rows, num_tokens

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = random.Random(index)
        start = rng.randrange(max(len(self._ids) - self._num_tokens, 1))
        return corrupt(self._ids[start : start + self._num_tokens], self._sentinels, self._end, rng)


def corrupt(ids: list[int], sentinels: list[int], end: int, rng: random.Random) -> dict[str, list[int]]:
    """Return T5's pair: the window with a sentinel for every span cut out, and the spans behind their sentinels."""
    num_noise = max(round(len(ids) * NOISE_DENSITY), 1)
    num_spans = max(min(round(num_noise / MEAN_SPAN_TOKENS), len(ids) - num_noise), 1)
    noise = _split(num_noise, num_spans, rng)
    kept = _split(len(ids) - num_noise, num_spans, rng)
    source, target, position = [], [], 0
    for sentinel, num_kept, num_cut in zip(sentinels, kept, noise, strict=False):
        source += [*ids[position : position + num_kept], sentinel]
        position += num_kept
        target += [sentinel, *ids[position : position + num_cut]]
        position += num_cut
    return {"input_ids": [*source, *ids[position:], end], "labels": [*target, end]}


def _split(total: int, parts: int, rng: random.Random) -> list[int]:
    """Return `parts` positive numbers with this sum, every choice of them equally likely."""
    cuts = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [after - before for before, after in pairwise(cuts)]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of the texts' own, which knows every text, with T5's special tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    end = ("</s>", SPECIAL_TOKENS.index("</s>"))
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Return a T5 1.1 of eight million weights as it is born."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=256, d_kv=64, d_ff=640, num_layers=4, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(13)
    return T5ForConditionalGeneration(config)


def pretrain(
    text: str, output_dir: Path, *, num_steps: int, batch_size: int, vocab_size: int, max_characters: int
) -> None:
    """Train tokenizer and model, and save both; a run that was stopped goes on from its last checkpoint."""
    texts = load_texts(text)
    random.Random(13).shuffle(texts)
    sizes = torch.tensor([len(text) for text in texts]).cumsum(0)
    texts = texts[: int((sizes <= max_characters).sum()) or 1]
    tokenizer = train_tokenizer(texts, vocab_size)
    model = build_model(tokenizer)
    ids = [token for row in tokenizer(texts, verbose=False)["input_ids"] for token in row]
    print(
        f"{len(ids):,} tokens of text, {model.num_parameters():,} weights, {num_steps} steps of {batch_size} windows"
    )
    sentinels = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[3:])
    args = TrainingArguments(
        output_dir=str(output_dir / "checkpoints"), max_steps=num_steps, per_device_train_batch_size=batch_size,
        learning_rate=2e-3, lr_scheduler_type="linear", warmup_steps=max(num_steps // 20, 1), max_grad_norm=1.0,
        save_steps=max(num_steps // 10, 1), save_total_limit=1, logging_steps=max(num_steps // 20, 1),
        report_to="none", disable_tqdm=True, seed=13,
    )  # fmt: skip
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        train_dataset=Corrupted(ids, sentinels, tokenizer.eos_token_id, num_rows=num_steps * batch_size),
        processing_class=tokenizer,
    )
    checkpoints = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="plain text, as `mend pretrain` takes it")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=16, help="windows of 128 tokens")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-characters", type=int, default=20_000_000, help="how much of the text is read")
    options: dict[str, Any] = vars(parser.parse_args())
    pretrain(**options)
