"""The model type `mend` of the lm-evaluation-harness: few-shot examples are distilled in place of being prepended.

The harness joins a task's few-shot examples into one text, in which nobody can tell them apart for certain. Only with
`apply_chat_template` does it hand them over one by one, as the messages of a conversation; so that is what `mend` asks
for. The conversation does not become a chat by that: what the distiller and the base model read is the prompt format
that the distiller was trained in, plain or chat. The answer's delimiter is the format's too, so white space around
the task's answers is dropped. A task's description stands in front of the first example and is distilled with it.

Importing this module registers the type. The command `lm_eval` imports no one else's types, so run

    python -m mend_hf.integrations.lm_eval run --model mend --model_args distiller=... --apply_chat_template ...
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoTokenizer

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.auto import get_mend_model, load_language_model
from mend_hf.config import MendConfig
from mend_hf.errors import ConfigError, DataError, MendError, UnsupportedModelError, import_extra
from mend_hf.messages import pair_messages
from mend_hf.model import MendModel
from mend_hf.prefix import KeyValuePrefix
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.prompt_format import get_prompt_format

import_extra("lm_eval", "lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.models.utils import handle_stop_sequences  # noqa: E402

Shots = tuple[tuple[str, str], ...]

_MARK = '[{"role": "'  # How the JSON of a conversation begins.


@dataclass(frozen=True)
class Conversation:
    """A request's context, taken apart.

    Attributes:
        shots: The few-shot examples as (input, output) pairs, one or more.
        query: What is asked.
        answer_start: What the answer begins with, the task's `gen_prefix`.
    """

    shots: Shots
    query: str
    answer_start: str = ""

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, str]], *, is_answer_begun: bool) -> Conversation | None:
        """Take apart what the harness hands over; None where there are no few-shot examples.

        Args:
            messages: Perhaps a system message, then user and assistant in turn.
            is_answer_begun: The last message is the begin of the answer.

        Raises:
            DataError: User and assistant do not take turns.
        """
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = list(messages[1:] if system else messages)
        start = turns.pop()["content"] if is_answer_begun else ""
        query = turns.pop()["content"]
        shots = [(question, answer.strip()) for question, answer in pair_messages(turns)]
        if not shots:
            return None
        if system:
            shots[0] = (f"{system.rstrip()}\n\n{shots[0][0]}", shots[0][1])
        return cls(tuple(shots), query, start.strip())

    @classmethod
    def from_context(cls, context: str) -> Conversation | None:
        """Read what `to_context` wrote; None: the context is another text."""
        if not context.startswith(_MARK):
            return None
        try:
            *turns, last = json.loads(context)
        except ValueError:
            return None
        start = ""
        if last["role"] == "assistant":
            start, last = last["content"], turns.pop()
        return cls(tuple(pair_messages(turns)), last["content"], start)

    def to_context(self) -> str:
        """Return the conversation as JSON: a context has to be text, which the harness stores, hashes and logs."""
        texts = [text for shot in self.shots for text in shot] + [self.query]
        texts += [self.answer_start] if self.answer_start else []
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
        return json.dumps(messages, ensure_ascii=False)


@register_model("mend")
class MendLM(HFLM):  # type: ignore[misc, unused-ignore]
    """A base model that answers the harness's requests from distilled few-shot examples.

    Every distinct set of examples is distilled once. Requests with the same examples are read together; where a task
    draws other examples for every document, the requests of one document are. Without examples, for the likelihood of
    whole texts and of answers without a context, the model type is `hf`, number for number.

    Args:
        pretrained: The frozen base model: a Hub id or a folder. None: the one that the distiller names.
        distiller: A saved distiller: a Hub id or a folder. None: training-free anchors.
        prompt_format: Of the training-free anchors; a distiller brings its own.
        allow_zero_shot: Answer requests without examples, and contexts of one text, as `hf` does. Without it they are
            refused, for the harness may have joined examples into such a text.
        revision: Of the base model. None: the one that the distiller names with its base model, else "main".
        gguf_file: A quantised file in `pretrained`.
        device: "cpu", "cuda", "mps" ... None: a GPU if there is one.
        dtype: Of the base model's weights; "auto": as saved.
        **harness: What `hf` takes for a model at hand: `batch_size`, `max_batch_size`, `max_length`, ...

    Raises:
        ConfigError: Neither a base model nor a distiller is named, or both a distiller and a prompt format.
        CheckpointError: The distiller was trained for another base model.
        UnsupportedModelError: The base model is an encoder-decoder.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        distiller: str | None = None,
        *,
        prompt_format: Literal["plain", "chat"] | None = None,
        allow_zero_shot: bool = False,
        revision: str | None = None,
        gguf_file: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        **harness: Any,
    ) -> None:
        if distiller is not None and prompt_format is not None:
            raise ConfigError(
                f"Expected prompt_format without a distiller, got {prompt_format!r} and {distiller!r}: leave it out, "
                "the distiller's own is used."
            )
        free = MendConfig(num_virtual_tokens=0, lora_r=0, prefix_form="kv", prompt_format=prompt_format or "plain")
        config = free if distiller is None else MendConfig.from_pretrained(distiller)
        name = pretrained or config.base_model_name_or_path
        if name is None:
            raise ConfigError("Expected pretrained=... or a distiller that names its base model, got neither.")
        revision = revision or (config.base_model_revision if pretrained is None else None) or "main"
        files = {"revision": revision} | ({"gguf_file": gguf_file} if gguf_file else {})
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **files)
            base_model = load_language_model(name, dtype=dtype, **files).to(device)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Expected a base model in a folder or on the Hub, got {name!r}: {str(error).splitlines()[0]}"
            ) from error
        if base_model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"Expected a decoder-only base model in the lm-evaluation-harness, got the encoder-decoder {name!r}: "
                "evaluate it with `mend evaluate`."
            )
        if distiller is None:
            model = get_mend_model(base_model, free, tokenizer).eval()
        else:
            model = MendModel.from_pretrained(base_model, distiller, tokenizer, config=config).eval()
        super().__init__(model, tokenizer=tokenizer, revision=revision, **harness)
        self.allow_zero_shot = allow_zero_shot
        # What is asked is read whole: the budget of a demonstration bounds the distiller's work, not the query's.
        self._prompt = PromptEncoder(
            tokenizer, dataclasses.replace(model.mend_config, max_demonstration_tokens=sys.maxsize)
        )

    @property
    def max_length(self) -> int:
        """Tokens that may stand behind what is distilled.

        Raises:
            DataError: None may.
        """
        window, num_taken = int(super().max_length), self._num_taken_positions
        if num_taken >= window:
            raise DataError(
                f"Expected few-shot examples that leave room for a query in a window of {window} tokens, got examples "
                f"that take {num_taken} positions: lower --num_fewshot."
            )
        return window - num_taken

    @property
    def tokenizer_name(self) -> str:
        """What `--cache_requests` tells requests apart by; `mend` writes other contexts than `hf` with a tokenizer."""
        return f"mend-{super().tokenizer_name}"

    @property
    def _num_taken_positions(self) -> int:
        bound = self.model.bound_demonstrations
        if bound is None:
            return 0
        prefix = bound.prefix
        return int(prefix.next_positions.max()) if isinstance(prefix, KeyValuePrefix) else prefix.num_slots

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return few-shot examples and a query in a form in which they stay apart; without examples, `hf`'s text.

        Raises:
            DataError: There are no examples, and `allow_zero_shot` is off.
        """
        conversation = Conversation.from_messages(chat_history, is_answer_begun=not add_generation_prompt)
        if conversation is not None:
            return conversation.to_context()
        self._check_zero_shot(chat_history[-1]["content"])
        return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's chat template for the record, nothing where it has none."""
        return super().chat_template(chat_template) if self.tokenizer.chat_template else ""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, for every request, the log-likelihood of the answer in nats and whether greedy search writes it."""
        responses = [(0.0, False)] * len(requests)
        for rows, distilled in self._group_by_shots(requests):
            with self._answering_from(distilled):
                answers = super().loglikelihood([requests[row] for row in rows], disable_tqdm=True)
            for row, answer in zip(rows, answers, strict=True):
                responses[row] = answer
        return responses

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what is written for every request, up to a stop of the task or the begin of another demonstration."""
        responses = [""] * len(requests)
        for rows, distilled in self._group_by_shots(requests):
            group = [requests[row] for row in rows]
            if distilled is not None:
                group = [self._stop_at_next_demonstration(request) for request in group]
            with self._answering_from(distilled):
                texts = super().generate_until(group, disable_tqdm=True)
            for row, text in zip(rows, texts, strict=True):
                responses[row] = text
        return responses

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids (B, T) and the mask of contexts that all have few-shot examples, or all have none."""
        conversations = [Conversation.from_context(string) for string in strings]
        rows = [self._encode_context(part) for part in conversations if part is not None]
        if not rows:
            return super().tok_batch_encode(list(strings), padding_side, left_truncate_len, **options)
        rows = [row[-left_truncate_len:] if left_truncate_len else row for row in rows]
        mask = self._prompt.pad([[1] * len(row) for row in rows], 0)
        return self._prompt.pad(rows, self._prompt.pad_token_id), mask

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        conversation = Conversation.from_context(context)
        if conversation is None:
            return super()._encode_pair(context, continuation)
        start = conversation.answer_start
        answer_ids = self._prompt.encode_answer(start + continuation if start else continuation.strip())
        num_begun = len(self._prompt.encode_answer(start)) if start else 0
        query_ids = self._prompt.encode_query(conversation.query)
        return query_ids + answer_ids[:num_begun], answer_ids[num_begun:]

    def _encode_context(self, conversation: Conversation) -> list[int]:
        start = conversation.answer_start
        return self._prompt.encode_query(conversation.query) + (self._prompt.encode_answer(start) if start else [])

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation: Any) -> Any:
        if self.model.bound_demonstrations is not None and self._prompt.stop_token_id is not None:
            generation["eos_token_id"] = [self._prompt.stop_token_id, self.eot_token_id]
        return super()._model_generate(context, max_length, stop, **generation)

    def _stop_at_next_demonstration(self, request: Instance) -> Instance:
        """Add a stop where the prompt format begins another demonstration, which the task does not know of."""
        form = get_prompt_format(self.tokenizer, self.model.mend_config)
        stop = form.turn_end or (form.separator + form.input_prefix).rstrip(" ")
        context, settings = request.args
        until = handle_stop_sequences(settings.get("until"), eos=None)
        return dataclasses.replace(
            request, arguments=(context, {**settings, "until": [*until, *([stop] * bool(stop))]})
        )

    def _answering_from(self, distilled: DistilledDemonstrations | None) -> AbstractContextManager[Any]:
        return self.model.disable_adapter() if distilled is None else self.model.use_demonstrations(distilled)

    def _group_by_shots(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[list[int], DistilledDemonstrations | None]]:
        """Yield the indices of requests that share their examples, with what these were distilled into.

        Raises:
            DataError: A context has no examples, and `allow_zero_shot` is off.
        """
        rows_of: dict[Shots | None, list[int]] = {}
        for row, request in enumerate(requests):
            conversation = Conversation.from_context(request.args[0])
            if conversation is None and request.args[0]:
                self._check_zero_shot(request.args[0])
            rows_of.setdefault(conversation.shots if conversation else None, []).append(row)
        if None in rows_of:
            yield rows_of.pop(None), None
        for shots, distilled in self._distil([shots for shots in rows_of if shots is not None]):
            yield rows_of[shots], distilled

    def _distil(self, tasks: Sequence[Shots]) -> Iterator[tuple[Shots, DistilledDemonstrations]]:
        num_at_once = self.max_batch_size if self.batch_size == "auto" else self.batch_size
        for start in range(0, len(tasks), num_at_once):
            part = tasks[start : start + num_at_once]
            distilled = self.model.distill([list(shots) for shots in part])
            for row, shots in enumerate(part):
                yield shots, distilled.select([row])

    def _check_zero_shot(self, text: str) -> None:
        if not self.allow_zero_shot:
            raise DataError(
                f"Expected few-shot examples apart from the query, got the one text {text[:80]!r}: give --num_fewshot "
                "and --apply_chat_template, and leave --fewshot_as_multiturn on; or set allow_zero_shot=True among "
                "the model's arguments to answer such requests as the model type hf does."
            )


def main() -> None:
    """Run the harness's command line with `mend` among its model types; a known error is one line, exit status 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MendError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
