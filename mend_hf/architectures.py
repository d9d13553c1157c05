"""What a base model must offer, and the few facts about it that transformers does not state in one place.

The only file that looks at model types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from mend_hf.errors import ConfigError, UnsupportedModelError

# What forward passes and their outputs call a cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next(name for name in CACHE_NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)

# Models that look positions up in a table, learned or computed once, and fail behind its end.
_POSITION_TABLES = frozenset({"biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt", "xglm"})
# The same of encoders, which count places and not tokens.
_ENCODER_TABLES = frozenset(
    {"bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart", "roformer"}
)
# ALiBi without position_ids: the first counts what the attention mask keeps, the second every slot of the cache.
_POSITIONS_FROM_MASK = frozenset({"bloom"})
_POSITIONS_FROM_SLOTS = frozenset({"mpt"})
# Models with states beside keys and values of which was measured that padding on the left changes nothing.
_BLIND_TO_PADDING = frozenset({"bamba", "falcon_mamba", "jamba", "lfm2", "mamba", "mamba2", "mpt", "qwen3_next"})
# Modules that a Mamba block reads past their forward pass, so that an adapter on them would be ignored (peft refuses).
_MAMBA_BLOCKS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_UNADAPTABLE_IN_MAMBA = ("out_proj", "conv1d")
# Layers of a cache whose slots can be picked and put together again.
_PLAIN_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
# Read both ways, and where not, number their positions in their own ways.
_ENCODERS = frozenset(
    {
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)

# What transformers' auto classes look for in a folder, where a distiller says that it is one.
DISTILLER_TYPE = "mend"
DISTILLER_RECORD_NAME, DISTILLER_RECORD = "config.json", {"model_type": DISTILLER_TYPE}

# Rotary positions whose angles depend on how much is read, so that keys do not stay right as a text grows.
_ROTATIONS_BY_LENGTH = frozenset({"dynamic", "longrope"})

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]

# The auto classes of transformers that load base models.
AUTO_CLASS_NAMES: dict[TaskType, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

_TASK_OF_HEAD: dict[str, TaskType] = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class DistillerConfig(PreTrainedConfig):
    """Stands in transformers' tables for a distiller, whose settings are in `mend_config.json`."""

    model_type = DISTILLER_TYPE


def check_base_model(base_model: nn.Module) -> TaskType:
    """Return PEFT's task type of a base model that can read a prefix.

    Raises:
        UnsupportedModelError: It is no transformers model, reads in both directions, has a head that this version does
            not know, or its forward pass takes no embeddings or no cache.
    """
    if not isinstance(base_model, PreTrainedModel):
        raise UnsupportedModelError(
            f"Expected a transformers model such as AutoModelForCausalLM gives, got {type(base_model).__name__}. "
            "Load the base model first and wrap that."
        )
    if base_model.config.is_encoder_decoder:
        return _check_encoder_decoder(base_model)
    if base_model.config.model_type in _ENCODERS:
        raise UnsupportedModelError(
            f"Expected a model trained to continue text, got the encoder {base_model.config.model_type!r}, which "
            "reads in both directions. Use a decoder-only model; an encoder can be a separate distiller."
        )
    missing = [name for name in _needed_arguments(base_model) if not accepts(base_model, name)]
    if missing:
        raise UnsupportedModelError(
            f"Expected a base model whose forward pass takes {', '.join(_needed_arguments(base_model))}; "
            f"{type(base_model).__name__} lacks {', '.join(missing)}. Use an attention model with explicit positions."
        )
    if any(getattr(module, "is_causal", None) is False for module in base_model.get_decoder().modules()):
        raise UnsupportedModelError(
            f"Expected a decoder-only base model, got {type(base_model).__name__}, which reads in both "
            "directions: what stands in front of a query would change with it, and nothing of it could be kept. Use "
            "a causal model, with or without a head: AutoModelForCausalLM, AutoModelForSequenceClassification."
        )
    if base_model.can_generate():
        return "CAUSAL_LM"
    for head, task_type in _TASK_OF_HEAD.items():
        if type(base_model).__name__.endswith(head):
            return task_type
    if get_backbone(base_model) is base_model:
        return "FEATURE_EXTRACTION"
    raise UnsupportedModelError(
        f"Expected a backbone, or a head for language modelling, sequence or token classification or question "
        f"answering, got {type(base_model).__name__}. Load it through AutoModelForCausalLM."
    )


def _needed_arguments(model: PreTrainedModel) -> tuple[str, ...]:
    if not holds_prefix_in_cache(model):
        return ("inputs_embeds", "attention_mask")
    positions = () if model.config.model_type in _POSITIONS_FROM_MASK else ("position_ids",)
    return ("inputs_embeds", CACHE_NAME, *positions)


def holds_prefix_in_cache(model: PreTrainedModel) -> bool:
    """Return whether a prefix can stand in the model's cache, slot by slot.

    It cannot where a layer keeps a state of all it has read (state spaces, linear attention, convolutions), where a
    layer sees blocks of the cache at fixed borders, and where the cache's slots are the positions.
    """
    if model.config.model_type in _POSITIONS_FROM_SLOTS:
        return False
    layer_types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    layers = DynamicCache(config=model.config).layers
    return "chunked_attention" not in layer_types and all(type(layer).__name__ in _PLAIN_LAYERS for layer in layers)


def reads_static_cache(model: PreTrainedModel) -> bool:
    """Return whether the model answers rightly from a cache of fixed length, whose end is empty at first.

    transformers keeps a mark of it. GPT-Neo, without it, answers wrongly there; Falcon with ALiBi, with it, fails.
    """
    has_alibi = model.config.model_type == "falcon" and model.config.alibi
    return bool(getattr(model, "_can_compile_fullgraph", False)) and not has_alibi


def choose_prefix_form(
    model: PreTrainedModel, prefix_form: Literal["kv", "embeds"] | None, *, is_shared: bool
) -> Literal["kv", "embeds"]:
    """Return the form of prefix that was asked for, or the best one for the base model.

    Args:
        model: The base model.
        prefix_form: What was asked for; None: whatever is best.
        is_shared: Whether the base model itself distils.

    Raises:
        ConfigError: The base model's cache cannot hold keys and values as a prefix, or an encoder, which sees both
            ways and keeps no cache, is asked to read them.
    """
    if model.config.is_encoder_decoder:
        if prefix_form == "kv":
            raise ConfigError(
                'Expected prefix_form="embeds" for an encoder-decoder base model, whose encoder sees both ways and '
                'reads no cache, got "kv": leave prefix_form out, with num_virtual_tokens at 1 or more. What needs '
                "keys and values, such as anchors without training, works with decoder-only base models."
            )
        return "embeds"
    has_slots = holds_prefix_in_cache(model)
    if prefix_form == "kv" and not has_slots:
        raise ConfigError(
            f'Expected prefix_form="embeds" for {type(model).__name__}, whose cache is more than a list of keys and '
            'values at given positions, got "kv": leave prefix_form out, or set it to "embeds".'
        )
    return prefix_form or ("kv" if is_shared and has_slots else "embeds")


def _check_encoder_decoder(base_model: PreTrainedModel) -> Literal["SEQ_2_SEQ_LM"]:
    """Return the task type of an encoder-decoder whose encoder reads embeddings in place of text.

    Raises:
        UnsupportedModelError: It has no language-model head, or its encoder reads sound or images.
    """
    if not base_model.can_generate():
        raise UnsupportedModelError(
            f"Expected an encoder-decoder with a language-model head, got {type(base_model).__name__}. "
            "Load it through AutoModelForSeq2SeqLM."
        )
    if not accepts(base_model, "inputs_embeds") or not accepts(base_model.get_encoder(), "inputs_embeds"):
        raise UnsupportedModelError(
            f"Expected an encoder that takes inputs_embeds, in front of which a prefix can stand; "
            f"{type(base_model).__name__} has none. Use an encoder-decoder that reads text, such as T5 or BART."
        )
    return "SEQ_2_SEQ_LM"


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the forward pass of a model has an argument of this name."""
    if "forward" in vars(model):  # compiled, or wrapped by somebody
        return argument in inspect.signature(model.forward).parameters
    return argument in _arguments_of(type(model).forward)


def rename_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in which a cache has the name that the installed transformers gives it, whichever it came by.

    Raises:
        ConfigError: There is one by each name.
    """
    given = [name for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(given) > 1:
        raise ConfigError(f"Expected one cache, got {' and '.join(given)}, which are the same argument: give one.")
    renamed = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return renamed | ({CACHE_NAME: arguments[given[0]]} if given else {})


@cache
def _arguments_of(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def get_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part that turns tokens into hidden states: no language-model head, and of T5 or BART the encoder."""
    if model.config.is_encoder_decoder:
        return model.get_encoder()
    return model.base_model


def get_embedding_width(model: PreTrainedModel) -> int:
    """Return E, the width of what goes in as `inputs_embeds` (OPT-350M: not the hidden width)."""
    return model.get_input_embeddings().weight.shape[1]


def keep_output_contiguous(model: PreTrainedModel) -> Callable[[], None]:
    """Let the language-model head of a frozen model read contiguous hidden states, and return what undoes it.

    torch multiplies a slice of hidden states, as `logits_to_keep` and `generate` make one, by a weight without
    `requires_grad` row by row, which takes several times as long in a batch; all else stays as it is.
    """
    head = model.get_output_embeddings()
    if head is None:
        return lambda: None
    return head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])).remove


def get_unadaptable_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of linear modules that cannot carry LoRA matrices in this model, or are of no use to it.

    Of heads peft leaves out those for language alone.
    """
    names = list(_UNADAPTABLE_IN_MAMBA) if model.config.model_type in _MAMBA_BLOCKS else []
    backbone = get_backbone(model)
    if backbone is not model and not model.can_generate():
        names += [name for name, child in model.named_children() if child is not backbone]
    return names


def embed_tokens(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Return tokens as the model takes them in `inputs_embeds`.

    Some encoders (Pegasus, Marian, Blenderbot-small) scale what their embedding layer gives, but not `inputs_embeds`.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    if not model.config.is_encoder_decoder:
        return embeddings
    return embeddings * getattr(get_backbone(model), "embed_scale", 1.0)


def get_max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a table of them holds; None where they are computed anew (rotary, ALiBi, T5)."""
    if model.config.model_type in _POSITION_TABLES | _ENCODER_TABLES:
        return model.config.max_position_embeddings
    if model.config.model_type in _POSITIONS_FROM_SLOTS:
        return model.config.max_seq_len
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)  # of BERT and its kin
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)  # RoBERTa begins there


def get_sliding_window(model: PreTrainedModel) -> int | None:
    """Return how far back a layer with sliding-window attention looks, in tokens; None where no layer has one."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "gpt_neo":
        return config.window_size if "local" in config.attention_layers else None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def reads_padding(model: PreTrainedModel) -> bool:
    """Return whether padding on the left may change what the model answers, whatever the mask says."""
    return not holds_prefix_in_cache(model) and model.config.model_type not in _BLIND_TO_PADDING


def rotates_by_length(model: PreTrainedModel) -> bool:
    """Return whether the angles of rotary positions change with the length of what is read (dynamic NTK, LongRoPE)."""
    rotations = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    by_layer_type = [rotation for rotation in rotations.values() if isinstance(rotation, dict)]
    return any(rotation.get("rope_type") in _ROTATIONS_BY_LENGTH for rotation in by_layer_type or [rotations])
