"""The meeting place: a frozen base model, a distiller, and distilled demonstrations that the base model reads.

Shapes: B rows, T query tokens, S prefix slots, D demonstration tokens, N chunks.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput, PushToHubMixin

from mend_hf.architectures import check_base_model
from mend_hf.artifact import DistilledDemonstrations, describe_origin
from mend_hf.config import MendConfig, pick_prefix_form
from mend_hf.demonstrations import EncodedTask, PromptEncoder, find_tokenizer, parse_demonstrations
from mend_hf.distiller import DemonstrationBatch, DemonstrationDistiller, load_reader
from mend_hf.errors import CheckpointError, DataError
from mend_hf.fingerprint import check_fingerprint, get_fingerprint
from mend_hf.hub import check_tensor_names, load_distiller_tensors, save_distiller
from mend_hf.prefix import KeyValuePrefix, Prefix
from mend_hf.routes import get_route
from mend_hf.routes.base import match_rows


class MendModel(PushToHubMixin, nn.Module):
    """A frozen base model that answers from distilled demonstrations.

    Without demonstrations, and under `disable_adapter()`, it is the bare base model, bit for bit. Attributes that it
    does not have itself are the base model's.

    Args:
        base_model: Decoder-only or encoder-decoder language model; its weights are never changed.
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
        fingerprint = get_fingerprint(base_model, tokenizer)
        check_fingerprint(config.base_model_fingerprint, fingerprint, "The distiller")
        self.mend_config = dataclasses.replace(
            config,
            task_type=task_type,
            base_model_name_or_path=config.base_model_name_or_path or base_model.name_or_path or None,
            base_model_fingerprint=fingerprint,
            prefix_form=pick_prefix_form(config, task_type),
            placeholder_initialization=config.placeholder_initialization or ("prompt" if tokenizer else "vocabulary"),
        )
        self._before = (base_model.training, [(p, p.requires_grad) for p in base_model.parameters()])
        reader, self.distiller_tokenizer = None, tokenizer
        if not config.is_shared:
            reader = load_reader(config).to(base_model.device)
            self.distiller_tokenizer = find_tokenizer(config.distiller_name_or_path, config.distiller_revision)
        self.tokenizer = tokenizer
        prompts: tuple[list[int] | None, list[int] | None] = (None, None)
        if self.mend_config.placeholder_initialization == "prompt":
            prompts = (self.prompt.empty_prompt_ids, self.distiller_prompt.empty_prompt_ids)
        self.distiller = DemonstrationDistiller(self.mend_config, base_model, reader, *prompts)
        for parameter, _ in self._before[1]:  # only now: an error above leaves the base model as it was
            parameter.requires_grad_(False)
        self.base_model = base_model.eval()
        self.route = get_route(base_model)
        self._source: str | None = None
        self._bound: DistilledDemonstrations | None = None
        self._is_disabled = False
        self._prepared: MutableMapping[DistilledDemonstrations, Prefix] = weakref.WeakKeyDictionary()

    @property
    def prompt(self) -> PromptEncoder:
        """Turns text into the base model's token ids; a ConfigError where no tokenizer is known."""
        return PromptEncoder(self.tokenizer, self.mend_config)

    @property
    def distiller_prompt(self) -> PromptEncoder:
        """Turns text into the distiller's token ids; of a shared distiller the same as `prompt`."""
        return PromptEncoder(self.distiller_tokenizer, self.mend_config)

    @torch.no_grad()
    def distill(self, demonstrations: Any) -> DistilledDemonstrations:
        """Read demonstrations once and return the prefix that stands for them.

        Args:
            demonstrations: One task: a list of (input, output) tuples, {"input", "output"} mappings or strings; a
                batch of tasks: a list of such lists; or token ids (B, D) of plain text, one task a row.

        Returns:
            Distilled demonstrations, one row a task, without gradients.

        Raises:
            DataError: There are no demonstrations, or one is malformed.
        """
        encoded = self._encode(demonstrations)
        provenance = describe_origin(self.mend_config, encoded, self._source, self.distiller.content_hash())
        return DistilledDemonstrations(self._distil(encoded), provenance)

    @torch.no_grad()
    def read(self, demonstrations: Any) -> DistilledDemonstrations:
        """Let the base model read the demonstrations as plain text and keep all of it: in-context learning, cached.

        Every token is a slot; what the budgets do not hold is cut away. Takes and raises what `distill` does.
        """
        prompt = PromptEncoder(self.tokenizer, dataclasses.replace(self.mend_config, overflow="truncate"))
        encoded = [prompt.encode_demonstrations(task) for task in parse_demonstrations(demonstrations)[0]]
        batch = DemonstrationBatch.from_tasks(encoded, prompt.pad_token_id).to(self.device)
        prefix = self.read_tokens(batch.input_ids, batch.attention_mask)
        return DistilledDemonstrations(prefix, describe_origin(self.mend_config, encoded, None, None))

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Prefix:
        """Return the prefix of token ids (B, N), padded on the left, that the bare base model reads as plain text."""
        return self.route.read_tokens(input_ids, attention_mask)

    @contextmanager
    def use_demonstrations(self, demonstrations: Any) -> Iterator[MendModel]:
        """Answer from these demonstrations inside the block whenever none are given."""
        before = self._bound
        self.set_demonstrations(demonstrations)
        try:
            yield self
        finally:
            self._bound = before

    def set_demonstrations(self, demonstrations: Any | None) -> None:
        """Answer from these demonstrations, raw or distilled, from now on whenever none are given; None: no more."""
        if demonstrations is not None and not isinstance(demonstrations, DistilledDemonstrations):
            demonstrations = self.distill(demonstrations)
        self._bound = demonstrations

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the bare base model inside the block, whatever demonstrations are bound or given."""
        before, self._is_disabled = self._is_disabled, True
        try:
            yield
        finally:
            self._is_disabled = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        demonstrations: Any | None = None,
        *,
        demo_input_ids: Tensor | None = None,
        demo_attention_mask: Tensor | None = None,
        demo_anchor_mask: Tensor | None = None,
        demo_task_rows: Tensor | None = None,
        query_task_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Run the base model over query tokens that attend to the demonstrations' prefix.

        Args:
            input_ids (B, T): The query's tokens alone.
            attention_mask (B, T): Of the query alone; padding may stand on either side.
            labels (B, T): As in the base model (an encoder-decoder's are the decoder's); -100 is ignored.
            demonstrations: Raw or distilled; one task for all rows or one a row. Gradients flow into raw ones.
            demo_input_ids (N, D): With the other `demo_` columns of `MendCollator`, in place of `demonstrations`.
            demo_attention_mask (N, D): 1 where there is a token.
            demo_anchor_mask (N, D): True at anchors.
            demo_task_rows (N,): The task that a chunk belongs to.
            query_task_rows (B,): The task that a row asks about.
            **kwargs: Passed to the base model.

        Returns:
            What the base model returns, with logits for the T query positions only; an encoder-decoder's logits are
            its decoder's, and it needs `labels` or `decoder_input_ids`.
        """
        if demo_input_ids is None:
            prefix = self._resolve(demonstrations)
        else:
            columns = (demo_input_ids, demo_attention_mask, demo_anchor_mask, demo_task_rows)
            prefix = self.distiller(DemonstrationBatch.from_columns(*columns))
        query = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if query is None or prefix is None or self._is_disabled:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones(query.shape[:2], dtype=torch.long, device=query.device)
        prefix = self.route.prepare(prefix)
        if query_task_rows is not None:
            prefix = prefix.select(query_task_rows)
        prefix = match_rows(prefix, attention_mask.shape[0])
        return self.route.forward(prefix, input_ids, attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | str | Sequence[str] | None = None,
        attention_mask: Tensor | None = None,
        demonstrations: Any | None = None,
        **generation: Any,
    ) -> Any:
        """Generate as the base model would for the user's tokens, answering from the demonstrations.

        Args:
            input_ids (B, T): The query's tokens, padded on the left; or text, which `tokenize` turns into them.
            attention_mask (B, T): Of the query alone.
            demonstrations: Raw, distilled or a prefix; one task for all rows or one a row.
            **generation: Passed to the base model's `generate`; lengths count the user's tokens, never the prefix.

        Returns:
            What the base model's `generate` returns: the prefix never appears in it.
        """
        input_ids = generation.pop("inputs", input_ids)
        if input_ids is not None and not isinstance(input_ids, Tensor):
            input_ids, attention_mask = self.tokenize(input_ids).values()
        prefix = self._resolve(demonstrations)
        if prefix is None or self._is_disabled:
            masks = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self.base_model.generate(input_ids, **masks, **generation)
        if not isinstance(input_ids, Tensor) or input_ids.shape[1] == 0:
            raise DataError("Expected a query of at least one token as input_ids (rows, tokens) or text, got none.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prefix = match_rows(self.route.prepare(prefix), input_ids.shape[0])
        return self.route.generate(prefix, input_ids, attention_mask, **generation)

    def answer(self, queries: Sequence[str], demonstrations: Any | None = None, **generation: Any) -> list[str]:
        """Return what follows each query up to the end of the answer, greedily unless `generation` says otherwise.

        An answer ends where the prompt format's separator begins. Takes and raises what `generate` does.
        """
        encoding = self.tokenize(queries)
        pad = {"pad_token_id": self.prompt.pad_token_id}
        settings = {"do_sample": False, "max_new_tokens": 32} | pad | generation
        ids = self.generate(**encoding, demonstrations=demonstrations, **settings)
        start = 0 if self.prompt.is_encoder_decoder else encoding["input_ids"].shape[1]
        texts = self.prompt.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        separator = self.mend_config.demonstration_separator
        return [(text.split(separator)[0] if separator else text).strip() for text in texts]

    def tokenize(self, queries: str | Sequence[str]) -> BatchEncoding:
        """Put queries into the prompt format and return their padded ids (B, T) and mask."""
        return self.prompt.encode_queries([queries] if isinstance(queries, str) else queries).to(self.device)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters the distiller trains, in PEFT's words."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        share = 100 * trainable / total
        sys.stdout.write(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}\n")

    def train(self, mode: bool = True) -> MendModel:
        """Set the distiller to training mode; the base model stays in evaluation mode, without dropout."""
        super().train(mode)
        self.base_model.eval()
        for layer in self.distiller.adapter_layers():
            layer.lora_dropout.train(mode)
        return self

    def unload(self) -> PreTrainedModel:
        """Return the base model as it was before it was wrapped; this model is of no use afterwards."""
        self.distiller.remove_adapter()
        for parameter, required_grad in self._before[1]:
            parameter.requires_grad_(required_grad)
        return self.base_model.train(self._before[0])

    def save_pretrained(
        self, save_directory: str | Path, *, dtype: torch.dtype | None = None, **push_to_hub: Any
    ) -> None:
        """Write the distiller into a folder: config, trained tensors and a card; never base weights.

        Args:
            save_directory: Made if need be, a CheckpointError if it is a file; all files are written or none.
            dtype: Store the tensors in this type, e.g. `torch.bfloat16` to halve them; None: as they are.
            **push_to_hub: Accepted for `push_to_hub`, which saves through this method.
        """
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.distiller.trained_tensors()}
        save_distiller(save_directory, self.mend_config, tensors)

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        name_or_path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        config: MendConfig | None = None,
        **hub: Any,
    ) -> MendModel:
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
        saved = MendConfig.from_pretrained(name_or_path, **hub)
        config = dataclasses.replace(config or saved, base_model_fingerprint=saved.base_model_fingerprint)
        model = cls(base_model, config, tokenizer)
        try:
            model.load_distiller(name_or_path, **hub)
        except CheckpointError:
            model.unload()
            raise
        return model.eval()

    def load_distiller(self, name_or_path: str | Path, **hub: Any) -> None:
        """Replace the distiller's tensors by saved ones of the same shapes."""
        self.load_state_dict(load_distiller_tensors(name_or_path, **hub))
        self._source = str(name_or_path)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the distiller's trained tensors: the frozen base model is never saved."""
        return {name: parameter.detach() for name, parameter in self.distiller.trained_tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load the distiller's trained tensors; names and shapes are checked in any case."""
        trained = dict(self.distiller.trained_tensors())
        check_tensor_names(trained, dict(state_dict), "the given state")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def _resolve(self, demonstrations: Any | None) -> Prefix | None:
        """Return the prefix to answer from: the argument's, else what is bound, else none."""
        if demonstrations is None:
            demonstrations = self._bound
        elif self._bound is not None and not self._is_disabled:
            raise DataError("Expected one source of demonstrations, got two: call set_demonstrations(None) first.")
        if demonstrations is None or self._is_disabled:
            return None
        if isinstance(demonstrations, Prefix):
            return demonstrations
        if not isinstance(demonstrations, DistilledDemonstrations):
            return self._distil(self._encode(demonstrations))
        made_for = demonstrations.provenance.base_model_fingerprint
        check_fingerprint(made_for, self.mend_config.base_model_fingerprint or {}, "What was distilled")
        if torch.is_grad_enabled() or isinstance(demonstrations.prefix, KeyValuePrefix):
            return demonstrations.prefix
        if demonstrations not in self._prepared:
            self._prepared[demonstrations] = self.route.prepare(demonstrations.prefix)
        return self._prepared[demonstrations]

    def _encode(self, demonstrations: Any) -> list[EncodedTask]:
        if isinstance(demonstrations, Tensor):
            return EncodedTask.from_ids(demonstrations)
        prompt = self.distiller_prompt
        return [prompt.encode_demonstrations(task) for task in parse_demonstrations(demonstrations)[0]]

    def _distil(self, encoded: list[EncodedTask]) -> Prefix:
        pad_token_id = self.distiller_prompt.pad_token_id if self.distiller_tokenizer else 0
        return self.distiller(DemonstrationBatch.from_tasks(encoded, pad_token_id).to(self.device))
