"""Base models with quantised weights, on a CPU: what they answer behind a prefix, and a distiller that trains in them.

Each library is tested where it is installed; the package needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_checks import QUERIES, SHOTS, greedy
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantoConfig,
)

from mend_hf import MendConfig, MendModel, get_mend_model
from mend_hf.errors import UnsupportedModelError


def quantize_torchao(folder: Path) -> PreTrainedModel:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def quantize_quanto(folder: Path) -> PreTrainedModel:
    pytest.importorskip("optimum.quanto")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))


def quantize_bitsandbytes(folder: Path, **bits: bool) -> PreTrainedModel:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**(bits or {"load_in_8bit": True}), bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for blocks of 64 weights."""
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(params=[quantize_torchao, quantize_quanto, quantize_bitsandbytes])
def base(request: pytest.FixtureRequest, folder: Path) -> PreTrainedModel:
    quantize: Callable[[Path], PreTrainedModel] = request.param
    return quantize(folder)


@torch.no_grad()
def test_vectors_equal_prepended_embeddings_but_for_the_error_of_the_quantised_weights(
    base: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = get_mend_model(base, MendConfig(num_virtual_tokens=4, prefix_form="embeds"), tokenizer)
    distilled, ids = model.distill(SHOTS), model.tokenize(QUERIES[0])["input_ids"]
    got = model(ids, demonstrations=distilled).logits
    inputs = torch.cat([distilled.vectors, base.get_input_embeddings()(ids)], dim=1)
    prepended, exact = (
        reader(inputs_embeds=inputs).logits[:, -ids.shape[1] :]
        for reader in (base, AutoModelForCausalLM.from_pretrained(folder))
    )
    # bitsandbytes also quantises what goes in, by the columns of one pass, and so never reads twice alike
    assert (got - prepended).abs().mean() < (prepended - exact).abs().mean()


@pytest.mark.parametrize("form", ["kv", "embeds"])
def test_a_distiller_trains_saves_and_loads_in_it(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: str, tmp_path: Path
) -> None:
    model = get_mend_model(base, MendConfig(num_virtual_tokens=4, prefix_form=form), tokenizer)
    batch = model.tokenize(QUERIES[0])
    with torch.no_grad():
        bare = model(**batch).logits
    trained = dict(model.distiller.trained_tensors())
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(**batch, labels=batch["input_ids"], demonstrations=SHOTS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert model(**batch).logits.equal(bare)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch, demonstrations=SHOTS).logits
        assert model.generate(**batch, demonstrations=SHOTS, **greedy()).shape[1] > batch["input_ids"].shape[1]
        loaded = MendModel.from_pretrained(model.unload(), tmp_path, tokenizer)
        assert loaded(**batch, demonstrations=SHOTS).logits.equal(expected)


def test_training_in_four_bits_on_a_cpu_is_refused(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = quantize_bitsandbytes(folder, load_in_4bit=True)
    model = get_mend_model(base, MendConfig(num_virtual_tokens=4), tokenizer).eval()
    assert model.generate(**model.tokenize("bad"), demonstrations=SHOTS, **greedy()).shape[0] == 1
    with pytest.raises(UnsupportedModelError, match="in 8 bits"):
        model.train()
