"""transformers pipelines that take demonstrations with every call, and rows of different tasks in one batch.

Shapes: B queries of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from mend_hf.artifact import DistilledDemonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.fingerprint import check_fingerprint
from mend_hf.guards import check_generates
from mend_hf.model import MendModel
from mend_hf.prefix import Prefix, stack_rows
from mend_hf.scoring import batch_by_length, score_options


@dataclass(frozen=True)
class _Question:
    """One input, ready to be asked.

    Attributes:
        query: Text.
        demonstrations: Of one task; None: what is bound to the model, or nothing.
        options: The answers to choose from.
    """

    query: str
    demonstrations: DistilledDemonstrations | None
    options: tuple[str, ...] = ()


class FewShotPipeline(Pipeline):
    """Asks queries behind demonstrations; what comes back is the subclasses' part.

    An input is a query as text, or a mapping {"query"} that may bring its own "demonstrations" (and "options"). Inputs
    come one by one, as a list, or as a generator or data set, which is read as its answers are asked for.

    Args:
        model: A MendModel whose base model has a language-model head.
        demonstrations: As for a call, where a call gives none.
        **kwargs: As for any `Pipeline` (`device`, `batch_size`), and what a call takes.

    Raises:
        ConfigError: The model is no MendModel, or worker processes are asked for.
        UnsupportedModelError: The base model has no language-model head.
    """

    _load_tokenizer = False  # the model has the one that its prompt format needs

    def __init__(self, model: MendModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, MendModel):
            raise ConfigError(
                f"Expected a MendModel, got {type(model).__name__}: load one with AutoMendModel.from_pretrained."
            )
        check_generates(model.base_model)
        super().__init__(model, *args, **kwargs)

    def __call__(self, inputs: Any, *, demonstrations: Any = None, **kwargs: Any) -> Any:
        """Ask one input, a list of them, or a stream.

        Args:
            inputs: Queries, see above.
            demonstrations: Raw or distilled, of one task for all inputs; or, where the inputs are a list, of as many
                tasks, one an input. None: those given to the pipeline, else those that are bound to the model.
            **kwargs: `batch_size`, and what the pipeline takes.

        Returns:
            The result of one input; a list of results for a list; an iterator over results for a stream.

        Raises:
            DataError: An input or the demonstrations are malformed, or they are not as many as the inputs.
            CheckpointError: The demonstrations were distilled for another base model.
        """
        if demonstrations is not None:
            demonstrations = self._distil(demonstrations)
            if len(demonstrations) > 1:
                inputs = _pair_up(inputs, demonstrations)
            else:
                kwargs["demonstrations"] = demonstrations
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def get_iterator(
        self,
        inputs: Iterable[Any],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Yield results in the order of the inputs, of which only one batch at a time is read.

        Raises:
            ConfigError: Worker processes are asked for, or a batch of no rows.
        """
        if num_workers or batch_size < 1:
            raise ConfigError(
                f"Expected num_workers=0 and a batch_size of at least 1, got {num_workers} and {batch_size}: queries "
                "are put into the prompt format where the model is."
            )
        return self._answer_in_batches(iter(inputs), batch_size, preprocess_params, forward_params, postprocess_params)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """Return the result of one input."""
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def preprocess(self, input_: Any, demonstrations: DistilledDemonstrations | None = None) -> _Question:
        """Read one input; demonstrations of its own come before those of the call."""
        item = {"query": input_} if isinstance(input_, str) else input_
        if not isinstance(item, Mapping) or not isinstance(item.get("query"), str):
            raise DataError(
                'Expected an input that is a text, or a mapping {"query", "demonstrations"} whose query is one, got '
                f"{input_!r}: bring it into one of these forms."
            )
        if item.get("demonstrations") is not None:
            demonstrations = self._distil(item["demonstrations"])
            if len(demonstrations) != 1:
                raise DataError(
                    f"Expected the demonstrations of one task with the query {item['query']!r}, got "
                    f"{len(demonstrations)} tasks: pick one with .select([...])."
                )
        return _Question(item["query"], demonstrations)

    @abstractmethod
    def _forward(self, questions: Sequence[_Question], **forward_params: Any) -> list[Any]:
        """Return one result a question."""

    def postprocess(self, result: Any) -> Any:
        """Return the result as it is."""
        return result

    def _answer_in_batches(
        self,
        inputs: Iterator[Any],
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        while batch := list(islice(inputs, batch_size)):
            questions = [self.preprocess(item, **preprocess_params) for item in batch]
            for result in self.forward(questions, **forward_params):
                yield self.postprocess(result, **postprocess_params)

    def _distil(self, demonstrations: Any) -> DistilledDemonstrations:
        if not isinstance(demonstrations, DistilledDemonstrations):
            return self.model.distill(demonstrations)
        made_for = demonstrations.provenance.base_model_fingerprint
        check_fingerprint(made_for, self.model.mend_config.base_model_fingerprint or {}, "What was distilled")
        return demonstrations

    def _find_prefix(self, questions: Sequence[_Question]) -> Prefix | None:
        """Return what stands in front of the questions, one row or B; None: they bring no demonstrations.

        Raises:
            DataError: Some bring demonstrations and others do not, or some are bound to the model as well.
        """
        given = [question.demonstrations for question in questions]
        tasks = [demonstrations for demonstrations in given if demonstrations is not None]
        if not tasks:
            return None
        if len(tasks) < len(given):
            raise DataError(
                f"Expected demonstrations with every input of a batch or with none, got them with {len(tasks)} of "
                f"{len(given)}: ask the others in a call of their own."
            )
        if self.model.bound_demonstrations is not None:
            raise DataError(
                "Expected one source of demonstrations, got two, given and bound: leave the block of "
                "use_demonstrations, or call set_demonstrations(None) first."
            )
        prepare = self.model.route.prepare
        if all(task is tasks[0] for task in tasks):
            return prepare(tasks[0].prefix)
        return stack_rows([prepare(task.prefix) for task in tasks])


class FewShotTextGenerationPipeline(FewShotPipeline):
    """Writes answers: [{"generated_text"}] an input, as many as `num_return_sequences`.

    Takes what `generate` takes (`max_new_tokens`, `num_beams`, ...); an answer ends where the prompt format's
    separator begins.
    """

    def _sanitize_parameters(
        self, demonstrations: Any = None, **generation: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess = {} if demonstrations is None else {"demonstrations": self._distil(demonstrations)}
        return preprocess, generation, {}

    def _forward(self, questions: Sequence[_Question], **generation: Any) -> list[list[dict[str, str]]]:
        prefix = self._find_prefix(questions)
        queries = [question.query for question in questions]
        results: list[list[dict[str, str]]] = [[] for _ in queries]
        for rows in batch_by_length(self.model, queries, len(queries)):
            part = prefix if prefix is None or len(prefix) == 1 else prefix.select(rows)
            texts = self.model.answer([queries[row] for row in rows], part, **generation)
            num_texts = len(texts) // len(rows)
            for index, row in enumerate(rows):
                own = texts[index * num_texts : (index + 1) * num_texts]
                results[row] = [{"generated_text": text} for text in own]
        return results


class FewShotClassificationPipeline(FewShotPipeline):
    """Chooses among options: [{"label", "score"}] an input, the likeliest first.

    Scores are the softmax of the options' mean log-likelihoods a token, so they sum to 1 over an input's options.

    Args:
        options: The answers to choose from, at least two; an input may bring its own as "options".
    """

    def _sanitize_parameters(
        self, demonstrations: Any = None, options: Sequence[str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess: dict[str, Any] = {} if options is None else {"options": options}
        if demonstrations is not None:
            preprocess["demonstrations"] = self._distil(demonstrations)
        return preprocess, {}, {}

    def preprocess(
        self,
        input_: Any,
        demonstrations: DistilledDemonstrations | None = None,
        options: Sequence[str] | None = None,
    ) -> _Question:
        """Read one input and its options."""
        question = super().preprocess(input_, demonstrations)
        options = input_.get("options", options) if isinstance(input_, Mapping) else options
        if options is None or isinstance(options, str) or not all(isinstance(option, str) for option in options):
            raise DataError(
                f"Expected the answers to choose from as a list of texts, got {options!r}: pass options=[...] or give "
                f'the input {question.query!r} "options" of its own.'
            )
        if len({*options}) < max(len(options), 2):
            raise DataError(
                f"Expected two or more different options to choose from, got {list(options)!r} for "
                f"{question.query!r}: correct them."
            )
        return _Question(question.query, question.demonstrations, tuple(options))

    def _forward(  # type: ignore[override]
        self, questions: Sequence[_Question]
    ) -> list[list[dict[str, Any]]]:
        prefix, bound = self._find_prefix(questions), self.model.bound_demonstrations
        if prefix is None and bound is not None:
            prefix = self.model.route.prepare(bound.prefix)
        queries, options = [question.query for question in questions], [question.options for question in questions]
        scores = score_options(self.model, queries, options, prefix, batch_size=len(queries))
        results = []
        for choices, values in zip(options, scores, strict=True):
            shares = torch.tensor(values).softmax(0).tolist()
            ranked = sorted(zip(shares, choices, strict=True), key=lambda pair: -pair[0])
            results.append([{"label": label, "score": share} for share, label in ranked])
        return results


def register_pipelines() -> None:
    """Let `transformers.pipeline` know "few-shot-text-generation" and "few-shot-classification".

    Its own tasks for text also stop logging that a MendModel is none of their models. Importing mend_hf does neither.
    """
    PIPELINE_REGISTRY.register_pipeline("few-shot-text-generation", FewShotTextGenerationPipeline, type="text")
    PIPELINE_REGISTRY.register_pipeline("few-shot-classification", FewShotClassificationPipeline, type="text")
    for task in ("text-generation", "text-classification", "token-classification", "feature-extraction"):
        if MendModel.__name__ not in SUPPORTED_PEFT_TASKS[task]:
            SUPPORTED_PEFT_TASKS[task].append(MendModel.__name__)


def _pair_up(inputs: Any, demonstrations: DistilledDemonstrations) -> list[dict[str, Any]]:
    """Give every input of a list its own task."""
    if not isinstance(inputs, list) or len(inputs) != len(demonstrations):
        got = f"a list of {len(inputs)}" if isinstance(inputs, list) else type(inputs).__name__
        raise DataError(
            f"Expected demonstrations of one task, or a list of as many inputs as the {len(demonstrations)} tasks, "
            f'got inputs of {got}: in a stream, let every input be {{"query", "demonstrations"}}.'
        )
    return [
        {**(item if isinstance(item, Mapping) else {"query": item}), "demonstrations": task}
        for item, task in zip(inputs, demonstrations, strict=True)
    ]
