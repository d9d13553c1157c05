"""The tools of the tests themselves: the tokenizer in the repository and the models made from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build_tokenizer import FOLDER, build_tokenizer
from tiny_models import TINY_MODELS
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def test_saved_tokenizer_is_what_the_script_builds(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    assert (FOLDER / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_tokenizer_splits_a_prompt_into_words_and_line_breaks(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Input: great film\nOutput: positive\n\nInput: a bore"
    tokens = ["Input", ":", " great", " film", "\n", "Output", ":", " positive", "\n\n", "Input", ":", " a", " bore"]
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_pads_on_the_left(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = tokenizer(["a great film", "film"], padding=True)
    assert batch.input_ids[1][:2] == [tokenizer.pad_token_id] * 2
    assert batch.attention_mask == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_model_is_the_same_at_every_call_and_tells_inputs_apart(
    name: str, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    state = torch.get_rng_state()
    models = [tiny_model(name), tiny_model(name)]
    assert torch.equal(torch.get_rng_state(), state)
    texts = [tokenizer(text, return_tensors="pt").input_ids for text in ("Input: great film", "Input: poor film")]
    with torch.no_grad():
        great, again, poor = (models[0](texts[0]).logits, models[1](texts[0]).logits, models[0](texts[1]).logits)
    assert torch.equal(great, again)
    # The last tokens are the same: only the words before them make the difference.
    assert (great[0, -1] - poor[0, -1]).abs().mean() > 0.1
