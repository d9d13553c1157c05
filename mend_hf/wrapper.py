"""A frozen base model with a distiller beside it: put together, trained, saved, loaded and taken apart again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mend_hf.architectures import check_base_model, choose_prefix_form, keep_output_contiguous
from mend_hf.cards import CardFacts
from mend_hf.config import MendConfig
from mend_hf.distiller import DemonstrationDistiller, load_reader
from mend_hf.errors import CheckpointError
from mend_hf.fingerprint import check_fingerprint, get_fingerprint
from mend_hf.guards import check_gradients, check_vocabulary
from mend_hf.hub import check_tensor_names, load_distiller, save_distiller, write_card
from mend_hf.prompt_encoder import PromptEncoder, find_tokenizer
from mend_hf.sharding import copy_whole
from mend_hf.upload import PushOptions, push_saved

if TYPE_CHECKING:
    from typing_extensions import Self


class WrappedModel(nn.Module):
    """What `MendModel` is made of, and how that is kept; how it answers is the subclass's part.

    Args:
        base_model: As for `MendModel`.
        config: Of the distiller.
        tokenizer: The base model's; None: looked up under the base model's name.
    """

    # The Trainer asks before it trains: what is trained, the distiller, never is, whatever the base model's storage.
    is_quantized = False

    def __init__(
        self, base_model: PreTrainedModel, config: MendConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__()
        task_type = check_base_model(base_model)
        tokenizer = tokenizer or find_tokenizer(base_model.name_or_path, config.base_model_revision)
        check_vocabulary(base_model, tokenizer)
        fingerprint = get_fingerprint(base_model, tokenizer)
        check_fingerprint(config.base_model_fingerprint, fingerprint, "The distiller")
        self.mend_config = dataclasses.replace(
            config,
            task_type=task_type,
            base_model_name_or_path=config.base_model_name_or_path or base_model.name_or_path or None,
            base_model_fingerprint=fingerprint,
            prefix_form=choose_prefix_form(base_model, config.prefix_form, is_shared=config.is_shared),
            placeholder_initialization=config.placeholder_initialization or ("prompt" if tokenizer else "vocabulary"),
        )
        self._before = (base_model.training, [(p, p.requires_grad) for p in base_model.parameters()])
        reader, self.distiller_tokenizer = None, tokenizer
        if not config.is_shared:
            reader = load_reader(config).to(base_model.device)
            self.distiller_tokenizer = find_tokenizer(config.distiller_name_or_path, config.distiller_revision)
            check_vocabulary(reader, self.distiller_tokenizer)
        self.tokenizer = tokenizer
        prompts: tuple[list[int] | None, list[int] | None, int | None] = (None, None, None)
        if self.mend_config.placeholder_initialization == "prompt":
            prompt = self.prompt
            prompts = (prompt.empty_prompt_ids, self.distiller_prompt.empty_prompt_ids, prompt.first_id)
        self.distiller = DemonstrationDistiller(self.mend_config, base_model, reader, *prompts)
        for parameter, _ in self._before[1]:  # only now: an error above leaves the base model as it was
            parameter.requires_grad_(False)
        self.base_model = base_model.eval()
        self._let_output_be = keep_output_contiguous(base_model)
        self._source: str | None = None

    @property
    def prompt(self) -> PromptEncoder:
        """Turns text into the base model's token ids; a ConfigError where no tokenizer is known."""
        return PromptEncoder(self.tokenizer, self.mend_config)

    @property
    def distiller_prompt(self) -> PromptEncoder:
        """Turns text into the distiller's token ids; of a shared distiller the same as `prompt`."""
        return PromptEncoder(self.distiller_tokenizer, self.mend_config)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters the distiller trains, in PEFT's words."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        share = 100 * trainable / total
        sys.stdout.write(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    def train(self, mode: bool = True) -> Self:
        """Set the distiller to training mode; the base model stays in evaluation mode, without dropout.

        Raises:
            UnsupportedModelError: No gradients pass through the base model's quantised weights.
        """
        if mode:
            check_gradients(self.base_model)
        super().train(mode)
        self.base_model.eval()
        for layer in self.distiller.adapter_layers():
            layer.lora_dropout.train(mode)
        return self

    def unload(self) -> PreTrainedModel:
        """Return the base model as it was before it was wrapped; this model is of no use afterwards."""
        self.distiller.remove_adapter()
        self._let_output_be()
        for parameter, required_grad in self._before[1]:
            parameter.requires_grad_(required_grad)
        return self.base_model.train(self._before[0])

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        facts: CardFacts | None = None,
    ) -> None:
        """Write the distiller into a folder: config, trained tensors and a card; never base weights.

        Args:
            save_directory: Made if need be, a CheckpointError if it is a file; all files are written or none.
            dtype: Store the tensors in this type, e.g. `torch.bfloat16` to halve them; None: as they are.
            state_dict: Store these in place of the distiller's own tensors, of which a process may hold parts alone.
            facts: What the card should say that the config does not know.
        """
        own = self.state_dict() if state_dict is None else state_dict
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in own.items()}
        save_distiller(save_directory, self.mend_config, tensors, facts)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        facts: CardFacts | None = None,
        **options: Any,
    ) -> CommitInfo:
        """Upload the distiller to the Hub in one commit; never base weights.

        What people wrote on the page outside the block of mend_hf, and the metadata that is there, stay.

        Args:
            repo_id: `name` or `owner/name`; the repository is made if need be.
            subfolder: Where in it; None: at its top.
            dtype: Store the tensors in this type; None: as they are.
            facts: What the card should say that the config does not know.
            **options: Those of `transformers`: `commit_message`, `commit_description`, `private`, `token`, `revision`,
                `create_pr`, `tags`; see `PushOptions`.

        Raises:
            HubError: The Hub refuses, or cannot be reached.
            CheckpointError: The card that is there cannot be read.
        """
        return push_saved(
            repo_id,
            lambda folder: self.save_pretrained(folder, dtype=dtype),
            partial(write_card, self.mend_config, facts, subfolder),
            PushOptions(**options),
            subfolder,
        )

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        name_or_path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        config: MendConfig | None = None,
        **hub: Any,
    ) -> Self:
        """Wrap a base model with a saved distiller.

        Args:
            base_model: The model that the distiller was trained for, or a fine-tune of it.
            name_or_path: A folder that `save_pretrained` wrote, or a Hub id.
            tokenizer: The base model's; None: looked up under the base model's name.
            config: In place of the saved one, e.g. with other budgets.
            **hub: `revision`, `token`, `cache_dir`, `subfolder` ... as in transformers.

        Raises:
            CheckpointError: Files are missing or damaged, or belong to another base model.
        """
        own = get_fingerprint(base_model, tokenizer)
        saved, tensors = load_distiller(
            name_or_path, lambda found: check_fingerprint(found.base_model_fingerprint, own, "The distiller"), **hub
        )
        config = dataclasses.replace(config or saved, base_model_fingerprint=saved.base_model_fingerprint)
        model = cls(base_model, config, tokenizer)
        try:
            model._take(tensors, name_or_path)
        except CheckpointError:
            model.unload()
            raise
        return model.eval()

    def load_distiller(self, name_or_path: str | Path, **hub: Any) -> None:
        """Replace the distiller's tensors by saved ones of the same shapes."""
        own = self.mend_config.base_model_fingerprint or {}
        _, tensors = load_distiller(
            name_or_path, lambda found: check_fingerprint(found.base_model_fingerprint, own, "The distiller"), **hub
        )
        self._take(tensors, name_or_path)

    def _take(self, tensors: dict[str, Tensor], name_or_path: str | Path) -> None:
        trained = dict(self.distiller.trained_tensors())
        check_tensor_names(trained, tensors, name_or_path)
        self.load_state_dict(tensors)
        self._source = str(name_or_path)

    def state_dict(  # type: ignore[override]
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the distiller's trained tensors, also as a part of another module: the base model is never saved."""
        destination = {} if destination is None else destination
        for name, parameter in self.distiller.trained_tensors():
            destination[prefix + name] = parameter if keep_vars else parameter.detach()
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load the distiller's trained tensors; names and shapes are checked in any case."""
        trained = dict(self.distiller.trained_tensors())
        check_tensor_names(trained, dict(state_dict), "the given state")
        for name, parameter in trained.items():
            copy_whole(parameter, state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)
