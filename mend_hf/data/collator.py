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
from mend_hf.demonstration_batch import DemonstrationBatch
from mend_hf.demonstrations import Demonstration, EncodedTask, parse_demonstrations
from mend_hf.errors import ConfigError, DataError
from mend_hf.losses import IGNORE_INDEX
from mend_hf.prompt_encoder import PromptEncoder
from mend_hf.prompt_format import change_prompt_format


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
        max_target_tokens: Longer targets lose their end.
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
        max_target_tokens: int = 256,
        max_teacher_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.with_teacher = with_teacher
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

        Raises:
            DataError: A row is malformed; the message names it.
        """
        encoded, teacher, queries, labels, task_rows = [], [], [], [], []
        for index, row in enumerate(rows):
            missing = [name for name in ("demonstrations", "query", "target") if name not in row]
            if missing:
                raise DataError(
                    f"Row {index}: expected demonstrations, query and target, got no {', '.join(missing)}: rename the "
                    "columns, and set remove_unused_columns=False in the training arguments."
                )
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
            for query, target in _pair_up(row["query"], row["target"], index):
                ids, label = self._encode_query(prompts.student, query, target, is_plain_text)
                queries.append(ids)
                labels.append(label)
                task_rows.append(index)
        prompt = self._prompts.student
        batch = DemonstrationBatch.from_tasks(encoded, self._prompts.distiller.pad_token_id)
        columns = {
            "input_ids": prompt.pad(queries, prompt.pad_token_id),
            "attention_mask": prompt.pad([[1] * len(ids) for ids in queries], 0),
            "labels": prompt.pad(labels, IGNORE_INDEX),
            "query_task_rows": torch.tensor(task_rows),
            "demo_input_ids": batch.input_ids,
            "demo_attention_mask": batch.attention_mask,
            "demo_anchor_mask": batch.anchor_mask,
            "demo_task_rows": batch.task_rows,
        }
        if self.with_teacher:
            texts = DemonstrationBatch.from_tasks(teacher, prompt.pad_token_id)
            columns |= {"teacher_input_ids": texts.input_ids, "teacher_attention_mask": texts.attention_mask}
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
