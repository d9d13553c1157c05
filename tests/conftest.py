"""Fixtures that several test files share; nothing here asks the network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from build_tokenizer import FOLDER
from tiny_encoder_decoders import build_tiny_encoder_decoder
from tiny_models import build_tiny_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from weights import load_smollm2


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The word-level tokenizer in `tests/assets/tokenizer`; pads on the left."""
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedModel]:
    """A function from a name in `tiny_models.TINY_MODELS` to a new model, equal at every call."""
    return lambda name: build_tiny_model(
        name,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedModel]:
    """A function from a name in `tiny_encoder_decoders.TINY_ENCODER_DECODERS` to a new model, equal at every call."""
    return lambda name: build_tiny_encoder_decoder(
        name,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, shared by all tests: leave the model as it was."""
    return load_smollm2()
