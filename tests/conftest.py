"""Fixtures that several test files share; nothing here asks the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from build_tokenizer import FOLDER
from hub_server import Hub, run_hub
from huggingface_hub import constants
from huggingface_hub.hf_api import api
from tiny_encoder_decoders import build_tiny_encoder_decoder
from tiny_models import build_tiny_model, ids_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import hub as transformers_hub
from weights import load_smollm2


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The word-level tokenizer in `tests/assets/tokenizer`; pads on the left."""
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedModel]:
    """A function from a name in `tiny_models.TINY_MODELS` to a new model, equal at every call."""
    return partial(build_tiny_model, **ids_of(tokenizer))


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], PreTrainedModel]:
    """A function from a name in `tiny_encoder_decoders.TINY_ENCODER_DECODERS` to a new model, equal at every call."""
    return partial(build_tiny_encoder_decoder, **ids_of(tokenizer))


@pytest.fixture
def reader_folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> str:
    """A GPT-2 of another width than the tiny models, with its tokenizer."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=2, n_positions=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "reader")
    tokenizer.save_pretrained(tmp_path / "reader")
    return str(tmp_path / "reader")


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer, shared by all tests: leave the model as it was."""
    return load_smollm2()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub of its own a test, to which the client in this process speaks as "user"."""
    with run_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the protocol of large files that is spoken here
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        monkeypatch.setattr(api, "endpoint", server.url)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "secret")
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()
