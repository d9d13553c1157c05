"""One collator for both stages: what the distiller, the student and the teacher each read.

Shapes: R tasks, N chunks, B queries, D demonstration tokens, T query tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mend_hf.config import MendConfig
from mend_hf.data.rows import is_list_of_text
from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.demonstrations import Demonstration, EncodedTask, parse_demonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.losses import IGNORE_INDEX
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.prompt_format import change_prompt_format

_Sequences = list[tuple[list[int], list[int]]]  # ids and labels


@dataclass(frozen=True)
class _Prompts:
    """How one prompt format is read.

    Attributes:
        student: Queries and targets, by the base model.
        distiller: Demonstrations, by the distiller.
        teacher: The same demonstrations, by the base model.
    """

    student: PromptEncoder
    distiller: PromptEncoder
    teacher: PromptEncoder


class MendCollator:
    """Turns rows {"demonstrations", "query", "target"} into a batch for `MendModel` and `MendTrainer`.

    A row's `query` and `target` are strings, or lists of strings: several queries of one task then share one
    distilling. Behind plain-text demonstrations (strings) query and target stand as they are; otherwise they are put
    into the prompt format, and the separator follows the target. Of an encoder-decoder (`config.task_type`) the
    encoder reads the query, and the decoder the target alone, with its end.

    A row may have a `prompt_format` of its own, for all three who read it: "chat", "plain", or a mapping of texts; see
    `prompt_format.change_prompt_format`.

    Teacher and distiller read the same demonstrations: what one budget cuts away, neither sees.

    Args:
        tokenizer: The base model's.
        config: Of the distiller: prompt format and budgets.
        distiller_tokenizer: Of a separate distiller; None: the base model's.
        with_teacher: Add the teacher's columns; the stock Trainer, which has no teacher, needs False.
        with_options: Add the options that are wrong, for the option loss; every row then needs `options`, a list of
            strings, or, where `query` is a list, one list a query. An empty list: any text may be the answer.
        max_target_tokens: Longer targets and options lose their end.
        max_teacher_tokens: Demonstration tokens that the teacher reads; None: as many as the distiller, which under
            `concat` and `recurrent` means all of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: MendConfig,
        distiller_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        with_teacher: bool = True,
        with_options: bool = False,
        max_target_tokens: int = 256,
        max_teacher_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.with_teacher = with_teacher
        self.with_options = with_options
        self.max_target_tokens = max_target_tokens
        self._config = config
        self._distiller_tokenizer = distiller_tokenizer or tokenizer
        self._max_teacher_tokens = max_teacher_tokens
        self._prompts = self._make_prompts(config)
        self._other_prompts: dict[str, _Prompts] = {}  # by the format that rows ask for, as JSON

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows.

        Returns:
            For the distiller `demo_input_ids`, `demo_attention_mask`, `demo_anchor_mask` (N, D) and `demo_task_rows`
            (N,); for the teacher `teacher_input_ids`, `teacher_attention_mask` (R, D); for the student `input_ids`,
            `attention_mask`, `labels` (B, T) and `query_task_rows` (B,): query and target, padded on the left, with
            labels on the target. For an encoder-decoder: the query in (B, T) and the target in `labels` (B, A), both
            padded on the right.

            With options, `option_input_ids`, `option_attention_mask`, `option_labels` and `option_query_rows` (O,):
            each query again with every option that is not its target, and which of the B queries it is.

        Raises:
            DataError: A row is malformed; the message names it.
        """
        encoded, teacher, task_rows = [], [], []
        queries: _Sequences = []
        wrong: _Sequences = []
        wrong_rows = []
        for index, row in enumerate(rows):
            _check_columns(row, index, self.with_options)
            tasks, is_batch = parse_demonstrations(row["demonstrations"])
            if is_batch:
                raise DataError(
                    f"Row {index}: expected the demonstrations of one task, got a list of lists: make every task a "
                    "row of its own, and write pairs as {'input': ..., 'output': ...}."
                )
            [demonstrations] = tasks
            prompts = self._find_prompts(row.get("prompt_format"), index)
            student_task, teacher_task = _encode_demonstrations(prompts, demonstrations)
            encoded.append(student_task)
            teacher.append(teacher_task)
            is_plain_text = demonstrations[0].output is None
            pairs = _pair_up(row["query"], row["target"], index)
            options = _list_options(row, len(pairs), index) if self.with_options else [()] * len(pairs)
            for (query, target), choices in zip(pairs, options, strict=True):
                others = [choice for choice in choices if choice != target]
                wrong += [self._encode_query(prompts.student, query, other, is_plain_text) for other in others]
                wrong_rows += [len(queries)] * len(others)
                queries.append(self._encode_query(prompts.student, query, target, is_plain_text))
                task_rows.append(index)
        prompt = self._prompts.student
        batch = DemonstrationBatch.from_tasks(encoded, self._prompts.distiller.pad_token_id)
        columns = {
            **_pad_sequences(prompt, queries, ""),
            "query_task_rows": torch.tensor(task_rows),
            "demo_input_ids": batch.input_ids,
            "demo_attention_mask": batch.attention_mask,
            "demo_anchor_mask": batch.anchor_mask,
            "demo_task_rows": batch.task_rows,
        }
        if self.with_teacher:
            texts = DemonstrationBatch.from_tasks(teacher, prompt.pad_token_id)
            columns |= {"teacher_input_ids": texts.input_ids, "teacher_attention_mask": texts.attention_mask}
        if self.with_options:
            columns |= _pad_sequences(prompt, wrong, "option_") | {
                "option_query_rows": torch.tensor(wrong_rows).long()
            }
        return columns

    def _make_prompts(self, config: MendConfig) -> _Prompts:
        window = config.max_distiller_tokens if config.overflow == "truncate" else sys.maxsize
        teacher_config = config.without_chunks(
            anchor_tokens="none", max_distiller_tokens=self._max_teacher_tokens or window
        )
        return _Prompts(
            PromptEncoder(self.tokenizer, config),
            PromptEncoder(self._distiller_tokenizer, config),
            PromptEncoder(self.tokenizer, teacher_config),
        )

    def _find_prompts(self, choice: Any, index: int) -> _Prompts:
        if choice is None:
            return self._prompts
        try:
            key = json.dumps(choice, sort_keys=True)
            if key not in self._other_prompts:
                self._other_prompts[key] = self._make_prompts(change_prompt_format(self._config, choice))
        except (ConfigError, TypeError) as error:
            raise DataError(
                f"Row {index}: expected a prompt_format that can be read, got {choice!r}: {error}"
            ) from error
        return self._other_prompts[key]

    def _encode_query(
        self, prompt: PromptEncoder, query: str, target: str, is_plain_text: bool
    ) -> tuple[list[int], list[int]]:
        if is_plain_text:
            head, answer, separator = prompt.encode_text(query), prompt.encode_text(target), []
        else:
            head, answer = prompt.encode_query(query), prompt.encode_answer(target)
            separator = prompt.separator_ids
        answer = answer[: self.max_target_tokens]
        if prompt.is_encoder_decoder:
            before, behind = prompt.target_frame
            return (head + prompt.query_end_ids if is_plain_text else head), before + answer + behind
        ids = head + answer + separator
        labels = [IGNORE_INDEX] * len(head) + answer + [IGNORE_INDEX] * len(separator)
        return ids, [IGNORE_INDEX, *labels[1:]]  # nothing predicts the first token


def _encode_demonstrations(prompts: _Prompts, demonstrations: list[Demonstration]) -> tuple[EncodedTask, EncodedTask]:
    """Return what distiller and teacher read: the same demonstrations."""
    student = prompts.distiller.encode_demonstrations(demonstrations, warn=False)
    teacher = prompts.teacher.encode_demonstrations(demonstrations, warn=False)
    num_read = min(student.num_demonstrations, teacher.num_demonstrations)
    if student.num_demonstrations != teacher.num_demonstrations:
        student = prompts.distiller.encode_demonstrations(demonstrations[:num_read], warn=False)
        teacher = prompts.teacher.encode_demonstrations(demonstrations[:num_read], warn=False)
    return student, teacher


def _check_columns(row: Mapping[str, Any], index: int, with_options: bool) -> None:
    missing = [name for name in ("demonstrations", "query", "target") if name not in row]
    if missing:
        raise DataError(
            f"Row {index}: expected demonstrations, query and target, got no {', '.join(missing)}: rename the "
            "columns, and set remove_unused_columns=False in the training arguments."
        )
    if with_options and "options" not in row:
        raise DataError(
            f"Row {index}: expected options beside the query because option_loss_weight is above 0, got only "
            f"{', '.join(row)}: add them, an empty list where any text may be the answer, or set the weight to 0."
        )


def _list_options(row: Mapping[str, Any], num_queries: int, index: int) -> list[Sequence[str]]:
    """Return the options of each of a row's queries."""
    options = [row["options"]] if isinstance(row["query"], str) else row["options"]
    are_lists = isinstance(options, list | tuple) and all(isinstance(choices, list | tuple) for choices in options)
    if not are_lists or len(options) != num_queries or not all(is_list_of_text([*choices]) for choices in options):
        raise DataError(
            f"Row {index}: expected options as a list of strings, or, for {num_queries} queries, as so many lists, "
            f"got {row['options']!r}."
        )
    return list(options)


def _pad_sequences(prompt: PromptEncoder, sequences: _Sequences, name: str) -> dict[str, Tensor]:
    """Return ids, mask and labels as columns; of no sequences, columns of no rows."""
    ids, labels = [ids for ids, _ in sequences], [labels for _, labels in sequences]
    columns = {
        "input_ids": (ids, prompt.pad_token_id),
        "attention_mask": ([[1] * len(row) for row in ids], 0),
        "labels": (labels, IGNORE_INDEX),
    }
    nothing = torch.zeros(0, 0, dtype=torch.long)
    return {name + column: prompt.pad(*values) if sequences else nothing for column, values in columns.items()}


def _pair_up(query: Any, target: Any, index: int) -> list[tuple[str, str]]:
    queries = [query] if isinstance(query, str) else query
    targets = [target] if isinstance(target, str) else target
    strings = [*queries, *targets] if isinstance(queries, Sequence) and isinstance(targets, Sequence) else [None]
    if not all(isinstance(text, str) for text in strings) or len(queries) != len(targets) or not queries:
        raise DataError(
            f"Row {index}: expected query and target as strings, or as lists of as many strings, got {query!r} "
            f"and {target!r}."
        )
    return list(zip(queries, targets, strict=True))
