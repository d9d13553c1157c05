"""Every family of base models, every feature: exact, or refused with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from family_checks import FEATURES, QUERIES, SHOTS, Family
from packaging.version import Version
from tiny_models import TINY_MODELS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RwkvConfig,
)

from mend_hf import MendConfig, get_mend_model
from mend_hf.architectures import CACHE_NAME, get_max_positions
from mend_hf.errors import ShapeError, UnsupportedModelError

WITHOUT_SLOTS = (
    "mpt",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "jamba",
    "bamba",
    "qwen3_next",
    "lfm2",
    "recurrent_gemma",
)
GENERATING = ("greedy", "beams", "sampling", "prompt lookup", "static cache", "embeds: batch = rows")


def remedy(name: str, feature: str) -> str | None:
    """What the message says where a feature is refused; None: it is exact."""
    if name in WITHOUT_SLOTS and feature.startswith("kv: "):
        return 'set it to "embeds"'
    if name == "bamba" and feature in GENERATING:
        return "use another base model"
    if name in ("gpt_neo", "falcon_alibi") and feature == "static cache":
        return "leave it out"
    if name == "recurrent_gemma" and feature == "embeds: batch = rows":
        return "one by one"
    if name in WITHOUT_SLOTS and feature == "prompt lookup":
        return "leave it out"
    if feature == "prompt lookup" and Version(transformers.__version__) < Version("5.20"):
        return "upgrade it"
    return None


@pytest.fixture(scope="module", params=TINY_MODELS)
def family(
    request: pytest.FixtureRequest,
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[Family]:
    """One family at a time, so that its wrapped models are made once."""
    return Family(request.param, lambda: tiny_model(request.param), tokenizer)


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_is_exact_or_refused(family: Family, feature: str) -> None:
    expected = remedy(family.name, feature)
    if expected is not None:
        with pytest.raises(ValueError, match=expected):
            FEATURES[feature](family)
    else:
        measured = FEATURES[feature](family)
        assert measured.is_right, measured


TABLES = {
    "biogpt": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    "codegen": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "ctrl": {"n_embd": 8, "n_layer": 1, "n_head": 2, "dff": 8},
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "gpt_bigcode": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "gpt_neo": {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "opt": {
        "hidden_size": 8,
        "word_embed_proj_dim": 8,
        "ffn_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "xglm": {"d_model": 8, "num_layers": 1, "attention_heads": 2, "ffn_dim": 8},
    "llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt_neox": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "falcon": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("model_type", TABLES)
def test_the_last_position_of_a_table_works_and_the_next_one_does_not(model_type: str) -> None:
    config = AutoConfig.for_model(
        model_type, vocab_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, **TABLES[model_type]
    )
    config.max_position_embeddings = 24
    model = AutoModelForCausalLM.from_config(config).eval()
    limit = get_max_positions(model)

    def read(position: int) -> None:
        model(torch.tensor([[3]]), position_ids=torch.tensor([[position]]), attention_mask=torch.ones(1, 1))

    if limit is None:
        return read(1000)
    assert limit == 24
    read(limit - 1)
    with pytest.raises((IndexError, RuntimeError)):
        read(limit)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8), "decoder-only"),
        (
            BartConfig(
                d_model=8,
                decoder_layers=1,
                decoder_attention_heads=2,
                decoder_ffn_dim=8,
                is_encoder_decoder=False,
                is_decoder=True,
            ),
            "lacks position_ids",
        ),
        (RwkvConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2), f"lacks {CACHE_NAME}"),
    ],
)
def test_models_that_would_read_a_prefix_wrongly_are_refused(config: AutoConfig, expected: str) -> None:
    with pytest.raises(UnsupportedModelError, match=expected):
        get_mend_model(AutoModelForCausalLM.from_config(config), MendConfig())


class TestVectorsInFrontOfEveryQuery:
    """What the route of models without slots owes its callers beyond the equations."""

    @pytest.fixture(scope="class")
    def mamba(self, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> Family:
        return Family("mamba", lambda: tiny_model("mamba"), tokenizer)

    def test_the_form_is_chosen(self, mamba: Family) -> None:
        config = get_mend_model(mamba.build(), MendConfig(num_virtual_tokens=2), mamba.tokenizer).mend_config
        assert config.prefix_form == "embeds"

    @torch.no_grad()
    def test_padding_may_stand_on_either_side(self, mamba: Family) -> None:
        model = mamba.wrap("embeds")
        batch, distilled = model.tokenize(QUERIES[:2]), model.distill(SHOTS)
        num_pads = int((batch["attention_mask"][1] == 0).sum())
        left = model(**batch, demonstrations=distilled).logits
        turned = {name: column.clone() for name, column in batch.items()}
        for column in turned.values():
            column[1] = column[1].roll(-num_pads)
        right = model(**turned, demonstrations=distilled).logits
        torch.testing.assert_close(right[1, :-num_pads], left[1, num_pads:], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(right[0], left[0], atol=2e-5, rtol=1e-5)

    @torch.no_grad()
    def test_the_loss_is_that_of_the_querys_tokens(self, mamba: Family) -> None:
        model = mamba.wrap("embeds")
        output = model(mamba.query, labels=mamba.query, demonstrations=SHOTS, output_hidden_states=True)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], mamba.query[0, 1:])
        torch.testing.assert_close(output.loss, expected)
        assert {states.shape[1] for states in output.hidden_states} == {mamba.query.shape[1]}

    @torch.no_grad()
    def test_the_last_logits_alone(self, mamba: Family) -> None:
        model = mamba.wrap("embeds")
        whole = model(mamba.query, demonstrations=SHOTS).logits
        assert model(mamba.query, demonstrations=SHOTS, logits_to_keep=1).logits.equal(whole[:, -1:])

    @pytest.mark.parametrize("is_config", [True, False])
    def test_lengths_count_the_users_tokens(self, mamba: Family, is_config: bool) -> None:
        model, num_tokens = mamba.wrap("embeds"), mamba.query.shape[1]
        lengths = {"max_length": num_tokens + 5, "min_length": num_tokens + 5, "do_sample": False, "pad_token_id": 0}
        settings = {"generation_config": GenerationConfig(**lengths)} if is_config else lengths
        ids = model.generate(mamba.query, demonstrations=SHOTS, **settings)
        assert ids.shape == (1, num_tokens + 5)
        assert ids[:, :num_tokens].equal(mamba.query)

    def test_keys_and_values_are_refused(
        self, mamba: Family, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        other = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=2), tokenizer)
        with pytest.raises(ShapeError, match="prefix_form"):
            mamba.wrap("embeds")(mamba.query, demonstrations=other.distill(SHOTS).prefix)

    def test_a_position_table_is_not_overrun(
        self, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        model = get_mend_model(tiny_model("mpt"), MendConfig(num_virtual_tokens=2), tokenizer)
        with pytest.raises(ShapeError, match="fewer demonstrations"):
            model(torch.full((1, 511), 5), demonstrations=SHOTS)
