"""The meeting place: a frozen base model, a distiller, and distilled demonstrations that the base model reads.

Shapes: B rows, T query tokens, S prefix slots, D demonstration tokens, N chunks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from mend_hf.architectures import CACHE_NAME, rename_cache
from mend_hf.artifact import DistilledDemonstrations
from mend_hf.binding import Binding
from mend_hf.config import MendConfig
from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.demonstrations import EncodedTask, parse_demonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.fingerprint import check_fingerprint
from mend_hf.guards import check_generates, check_pooling
from mend_hf.prefix import KeyValuePrefix, Prefix
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.provenance import describe_origin
from mend_hf.recompute import find_layers, recompute_layers
from mend_hf.routes import get_route
from mend_hf.routes.base import Route, match_rows
from mend_hf.routes.prepended import PrependedRoute
from mend_hf.scoring import choose_options, option_priors
from mend_hf.wrapper import WrappedModel


class MendModel(WrappedModel):
    """A frozen base model that answers from distilled demonstrations.

    Without demonstrations, and under `disable_adapter()`, it is the bare base model, bit for bit. Attributes that it
    does not have itself are the base model's.

    Args:
        base_model: Decoder-only model with a head for language or classes, or none, or an encoder-decoder language
            model; its weights are never changed.
        config: Of the distiller.
        tokenizer: The base model's; None: looked up under the base model's name.
    """

    def __init__(
        self, base_model: PreTrainedModel, config: MendConfig, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        super().__init__(base_model, config, tokenizer)
        self.route = get_route(base_model)
        self._binding = Binding()
        self._forgetful_layers: list[nn.Module] = []
        self._prepared: MutableMapping[DistilledDemonstrations, Prefix] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def distill(self, demonstrations: Any, *, batch_size: int | None = None) -> DistilledDemonstrations:
        """Read demonstrations once and return the prefix that stands for them.

        Args:
            demonstrations: One task: a list of (input, output) tuples, {"input", "output"} mappings or strings; a
                batch of tasks: a list of such lists; or token ids (B, D) of plain text, one task a row.
            batch_size: Chunks that the distiller reads at once, which bounds the memory; None: all.

        Returns:
            Distilled demonstrations, one row a task, without gradients.

        Raises:
            DataError: There are no demonstrations, or one is malformed.
        """
        encoded = self._encode(demonstrations)
        provenance = describe_origin(self.mend_config, encoded, self._source, self.distiller.content_hash())
        chunks = self.distiller.distil_chunks(self._batch(encoded), batch_size)
        return DistilledDemonstrations(chunks, provenance)

    @torch.no_grad()
    def read(self, demonstrations: Any) -> DistilledDemonstrations:
        """Let the base model read the demonstrations as plain text and keep all of it: in-context learning, cached.

        Every token is a slot; what the budgets do not hold is cut away. Takes and raises what `distill` does.
        """
        prompt = PromptEncoder(self.tokenizer, self.mend_config.without_chunks())
        encoded = [prompt.encode_demonstrations(task) for task in parse_demonstrations(demonstrations)[0]]
        batch = DemonstrationBatch.from_tasks(encoded, prompt.pad_token_id).to(self.device)
        prefix = self.read_tokens(batch.input_ids, batch.attention_mask)
        return DistilledDemonstrations(prefix, describe_origin(prompt.config, encoded, None, None))

    def read_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Prefix:
        """Return the prefix of token ids (B, N), padded on the left, that the bare base model reads as plain text."""
        return self.route.read_tokens(input_ids, attention_mask)

    @contextmanager
    def use_demonstrations(self, demonstrations: Any) -> Iterator[MendModel]:
        """Answer from these demonstrations inside the block whenever none are given.

        The block is that of one thread, or of one asyncio task: others may be in blocks of their own at the same time.
        A thread that is started inside the block does not take part unless it runs in `contextvars.copy_context()`.
        """
        with self._binding.bind_here(self._distil_if_raw(demonstrations)):
            yield self

    def set_demonstrations(self, demonstrations: Any | None) -> None:
        """Answer from these demonstrations, raw or distilled, from now on whenever none are given; None: no more.

        They are set for all threads; inside a block of `use_demonstrations` the block's stay in use.
        """
        self._binding.set_everywhere(self._distil_if_raw(demonstrations))

    @property
    def bound_demonstrations(self) -> DistilledDemonstrations | None:
        """What is answered from, here, whenever no demonstrations are given; None under `disable_adapter()`."""
        return None if self._binding.is_disabled else self._binding.demonstrations

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the bare base model inside the block, in this thread, whatever demonstrations are bound or given."""
        with self._binding.disable_here():
            yield

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
            attention_mask (B, T): Of the query alone; padding may stand on either side. With the cache of an
                earlier call, which holds the prefix, of all the user's tokens so far.
            labels (B, T): As in the base model (an encoder-decoder's are the decoder's); -100 is ignored.
            demonstrations: Raw or distilled; one task for all rows or one a row. Gradients flow into raw ones.
            demo_input_ids (N, D): With the other `demo_` columns of `MendCollator`, in place of `demonstrations`.
            demo_attention_mask (N, D): 1 where there is a token.
            demo_anchor_mask (N, D): True at anchors.
            demo_task_rows (N,): The task that a chunk belongs to.
            query_task_rows (B,): The task that a row asks about.
            **kwargs: Passed to the base model; a cache as `cache` or as `past_key_values`.

        Returns:
            What the base model returns, with logits for the T query positions only; an encoder-decoder's logits are
            its decoder's, and it needs `labels` or `decoder_input_ids`.
        """
        batch, kwargs = None, rename_cache(kwargs)
        if demo_input_ids is not None and not self._binding.is_disabled:
            columns = (demo_input_ids, demo_attention_mask, demo_anchor_mask, demo_task_rows)
            batch = DemonstrationBatch.from_columns(*columns)
        with self._forgetting_activations() as route:
            prefix = self._resolve(demonstrations) if batch is None else self.distiller(batch)
            return self._read(route, prefix, input_ids, attention_mask, labels, query_task_rows, kwargs)

    def _read(
        self,
        route: Route,
        prefix: Prefix | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        query_task_rows: Tensor | None,
        kwargs: dict[str, Any],
    ) -> ModelOutput:
        """Run the base model over the query behind a prefix, or alone."""
        query = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if labels is not None:
            kwargs["labels"] = labels
        if query is None or prefix is None:
            return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        prefix = route.prepare(prefix)
        if query_task_rows is not None:
            prefix = prefix.select(query_task_rows)
        prefix = match_rows(prefix, query.shape[0])
        if attention_mask is None:
            cache = kwargs.get(CACHE_NAME)
            num_held = max(int(cache.get_seq_length()) - prefix.num_slots, 0) if cache is not None else 0
            shape = (query.shape[0], num_held + query.shape[1])
            attention_mask = torch.ones(shape, dtype=torch.long, device=query.device)
        if self.mend_config.task_type == "SEQ_CLS":
            check_pooling(self.base_model, input_ids, attention_mask)
        return route.forward(prefix, input_ids, attention_mask, **kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, **options: Any
    ) -> None:
        """Save memory in training: layers compute twice what they would keep for the backward pass (embeds form).

        Args:
            activation_checkpointing_kwargs: Accepted as the Trainer gives it; only `use_reentrant=False` goes.
            every_n_layers: Treat only every n-th layer so; the others keep all.
            **options: Accepted as the Trainer gives it; `offload` has to be False.

        Raises:
            ConfigError: The prefix is keys and values, which are kept in any case, or an option is not to be had.
            UnsupportedModelError: The model has no layers that can be computed twice.
        """
        if self.mend_config.prefix_form != "embeds":
            raise ConfigError(
                'Expected prefix_form="embeds" for activation checkpointing, got "kv", where the layers\' keys and '
                "values are the prefix: save memory with a lower max_tokens_per_pass instead."
            )
        if (activation_checkpointing_kwargs or {}).get("use_reentrant") or any(options.values()):
            raise ConfigError(
                "Expected activation checkpointing with use_reentrant=False and without offload, got "
                f"{activation_checkpointing_kwargs} and {options}: leave both out."
            )
        readers = [self.base_model] + ([] if self.distiller.reader is None else [self.distiller.reader])
        self._forgetful_layers = [layer for reader in readers for layer in find_layers(reader)[::every_n_layers]]

    def activation_checkpointing_disable(self) -> None:
        """Let all layers keep their activations again."""
        self._forgetful_layers = []

    @contextmanager
    def _forgetting_activations(self) -> Iterator[Route]:
        """Return the route by which queries read inside the block: in training, one that layers can go twice."""
        if not (self._forgetful_layers and self.training and torch.is_grad_enabled()):
            yield self.route
            return
        with recompute_layers(self._forgetful_layers):
            yield self.route if self.config.is_encoder_decoder else PrependedRoute(self.base_model)

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
                To go on with a chat, give the cache of a call with the same demonstrations together with
                all tokens so far, old and new, as in transformers; an empty cache is filled with the prefix.

        Returns:
            What the base model's `generate` returns: the prefix never appears in it.
        """
        check_generates(self.base_model)
        generation = rename_cache(generation)
        given = generation.pop("inputs", input_ids)
        if given is not None and not isinstance(given, Tensor):
            given, attention_mask = self.tokenize(given, is_alone=self._is_alone(demonstrations)).values()
        prefix = self._resolve(demonstrations)
        if prefix is None:
            masks = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self.base_model.generate(given, **masks, **generation)
        query = generation.get("inputs_embeds") if given is None else given
        if not isinstance(query, Tensor) or query.shape[1] == 0:
            raise DataError("Expected a query of at least one token as input_ids (rows, tokens) or text, got none.")
        if attention_mask is None:
            attention_mask = torch.ones(query.shape[:2], dtype=torch.long, device=query.device)
        prefix = match_rows(self.route.prepare(prefix), query.shape[0])
        return self.route.generate(prefix, given, attention_mask, **generation)

    def answer(
        self,
        queries: str | Sequence[str],
        demonstrations: Any | None = None,
        *,
        options: Sequence[str] | None = None,
        option_priors: Mapping[str, float] | None = None,
        **generation: Any,
    ) -> list[str]:
        """Return what follows each query up to the end of the answer, greedily unless `generation` says otherwise.

        An answer ends where the prompt format's separator, in a chat the end of the turn, begins. Takes and raises
        what `generate` does, and beside it:

        Args:
            queries: B texts, or one.
            demonstrations: As for `generate`.
            options: What may be answered; the likeliest by the mean log-likelihood of its tokens is returned, and
                nothing is generated.
            option_priors: What `self.option_priors` returned, taken off before options are compared.
            **generation: As for `generate`; nothing beside `options`.

        Raises:
            ConfigError: There are both `options` and settings of `generate`, or priors of none.
            DataError: There are not two or more different `options`, or one has no prior.
        """
        if options is not None:
            return self._choose(queries, demonstrations, options, option_priors, generation)
        if option_priors is not None:
            raise ConfigError("Expected options to take option_priors off, got none: give options too.")
        prompt = self.prompt
        encoding = self.tokenize(queries, is_alone=self._is_alone(demonstrations))
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": prompt.pad_token_id}
        if prompt.stop_token_id is not None:
            ends = self.base_model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
            settings["eos_token_id"] = [prompt.stop_token_id, *ends]
        ids = self.generate(**encoding, demonstrations=demonstrations, **settings | generation)
        start = 0 if prompt.is_encoder_decoder else encoding["input_ids"].shape[1]
        return prompt.decode_answers(ids[:, start:].tolist())

    @torch.no_grad()
    def _choose(
        self,
        queries: str | Sequence[str],
        demonstrations: Any | None,
        options: Sequence[str],
        priors: Mapping[str, float] | None,
        generation: Mapping[str, Any],
    ) -> list[str]:
        """Return the likeliest of the options behind each query."""
        check_generates(self.base_model)
        if generation:
            raise ConfigError(
                f"Expected options alone, which nothing is generated for, got {', '.join(generation)} too: leave out "
                "the one or the others."
            )
        queries = [queries] if isinstance(queries, str) else queries
        return choose_options(self, queries, options, self._resolve(demonstrations), priors)

    @torch.no_grad()
    def option_priors(
        self, options: Sequence[str], inputs: Sequence[str], demonstrations: Any | None = None
    ) -> dict[str, float]:
        """Return what each option gets whatever is asked, for `answer` to take off: calibration, once a task.

        Args:
            options: All that queries will be given to choose from.
            inputs: Texts such as will be asked, without answers; a handful of the demonstrations' own will do.
            demonstrations: As for `answer`, of one task.

        Raises:
            DataError: There are no options or no inputs.
            ShapeError: There is more than one task.
        """
        check_generates(self.base_model)
        return option_priors(self, inputs, options, self._resolve(demonstrations))

    def tokenize(self, queries: str | Sequence[str], *, is_alone: bool = False) -> BatchEncoding:
        """Put queries into the prompt format and return their padded ids (B, T) and mask.

        Args:
            queries: One text or several.
            is_alone: No demonstrations stand in front: a chat then begins here.
        """
        queries = [queries] if isinstance(queries, str) else queries
        return self.prompt.encode_queries(queries, is_alone=is_alone).to(self.device)

    def _is_alone(self, demonstrations: Any | None) -> bool:
        """Return whether a query meets no demonstrations, neither the argument's nor bound ones."""
        return self._binding.is_disabled or (demonstrations is None and self._binding.demonstrations is None)

    def _resolve(self, demonstrations: Any | None) -> Prefix | None:
        """Return the prefix to answer from: the argument's, else what is bound, else none."""
        bound = self._binding.demonstrations
        if self._is_alone(demonstrations):
            return None
        if demonstrations is not None and bound is not None:
            raise DataError(
                "Expected one source of demonstrations, got two, given and bound: leave the block of "
                "use_demonstrations, or call set_demonstrations(None) first."
            )
        demonstrations = bound if demonstrations is None else demonstrations
        if isinstance(demonstrations, Prefix):
            return demonstrations
        if not isinstance(demonstrations, DistilledDemonstrations):
            return self.distiller(self._batch(self._encode(demonstrations)))
        made_for = demonstrations.provenance.base_model_fingerprint
        check_fingerprint(made_for, self.mend_config.base_model_fingerprint or {}, "What was distilled")
        if torch.is_grad_enabled() or isinstance(demonstrations.prefix, KeyValuePrefix):
            return demonstrations.prefix
        prepared = self._prepared.get(demonstrations)
        if prepared is None:  # several threads may get here at once, and then each makes the same
            prepared = self._prepared[demonstrations] = self.route.prepare(demonstrations.prefix)
        return prepared

    def _distil_if_raw(self, demonstrations: Any | None) -> DistilledDemonstrations | None:
        is_raw = demonstrations is not None and not isinstance(demonstrations, DistilledDemonstrations)
        return self.distill(demonstrations) if is_raw else demonstrations

    def _encode(self, demonstrations: Any) -> list[EncodedTask]:
        if isinstance(demonstrations, Tensor):
            return EncodedTask.from_ids(demonstrations)
        prompt = self.distiller_prompt
        return [prompt.encode_demonstrations(task) for task in parse_demonstrations(demonstrations)[0]]

    def _batch(self, encoded: list[EncodedTask]) -> DemonstrationBatch:
        pad_token_id = self.distiller_prompt.pad_token_id if self.distiller_tokenizer else 0
        return DemonstrationBatch.from_tasks(encoded, pad_token_id).to(self.device)
