"""Demonstrations, queries and answers as token ids with their anchors: prompt format, truncation, chunking."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from mend_hf.config import MendConfig
from mend_hf.demonstrations import Demonstration, EncodedChunk, EncodedTask, name_demonstration
from mend_hf.errors import ConfigError, DataError
from mend_hf.prompt_format import get_prompt_format

MIN_TEXT_TOKENS = 2  # Of a demonstration inside its turns: one of the input, one of the answer.

_SENTENCE_END = re.compile(r"[.!?。！？][\"')\]”’]*\s*$|\n")  # noqa: RUF001


def find_tokenizer(name_or_path: str | None, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer saved beside a model; None where there is none: token ids can still go in."""
    if not name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision or "main")
    except (OSError, ValueError):
        return None


class PromptEncoder:
    """Turns demonstrations, queries and answers into token ids in a config's prompt format.

    Inputs, outputs and separators are tokenised apart, so the ids of a piece never depend on its neighbours: dropping
    a demonstration drops exactly its ids, and an answer's ids are the same wherever it stands.

    For an encoder-decoder, a query ends for the encoder with what its tokenizer puts behind a text (`</s>`; of mBART
    also the language): it was trained on texts that all ended so. Demonstrations, a part of the text in front of the
    query, have no such end. A target is what the decoder learns to write: with all that the tokenizer puts around a
    target, and in any case the end-of-text id, behind which `generate` stops.

    Args:
        tokenizer: Of the model that reads.
        config: Prompt format and budgets.

    Raises:
        ConfigError: There is no tokenizer; or the config asks for a chat and the chat template is missing, does not
            write one turn like the next, or alone exceeds the budgets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, config: MendConfig) -> None:
        if tokenizer is None:
            raise ConfigError(
                "Expected a tokenizer to read text with, and found none under the model's name: pass tokenizer=... "
                "when wrapping the model."
            )
        self.tokenizer = tokenizer
        self.config = config
        self.is_encoder_decoder = config.task_type == "SEQ_2_SEQ_LM"
        self._format = get_prompt_format(tokenizer, config)
        self._separator_ids = self._ids(self._format.separator)
        self._output_prefix_ids = self._ids(self._format.output_prefix)
        self._turn_end_ids = self._ids(self._format.turn_end)
        self._check_budgets()
        self._ends_sentence: dict[int, bool] = {}

    def encode_query(self, query: str, *, is_alone: bool = False) -> list[int]:
        """Return the ids of a query up to where its answer begins; a long one is cut like a demonstration.

        Args:
            query: Its text.
            is_alone: No demonstrations stand in front of it: in a chat it then begins with what the template puts
                first.
        """
        head, num_around = self._input_ids(query)
        tail = self._output_prefix_ids
        ids = head[: max(self.config.max_demonstration_tokens - len(tail), num_around)] + tail + self.query_end_ids
        return self._ids(self._format.opening or "") + ids if is_alone else ids

    def encode_queries(self, queries: Sequence[str], *, is_alone: bool = False) -> BatchEncoding:
        """Return the padded ids (B, T) and the mask of several queries; `encode_query` makes each, `pad` pads.

        Raises:
            DataError: There is no query.
        """
        if not queries:
            raise DataError("Expected at least one query, got none: give one or more.")
        rows = [self.encode_query(query, is_alone=is_alone) for query in queries]
        return BatchEncoding(
            {
                "input_ids": self.pad(rows, self.pad_token_id),
                "attention_mask": self.pad([[1] * len(row) for row in rows], 0),
            }
        )

    def pad(self, rows: Sequence[list[int]], value: int) -> torch.Tensor:
        """Return rows as (B, T), padded on the left, behind which an answer follows; for an encoder on the right.

        Args:
            rows: B lists.
            value: What fills a row.
        """
        length = max(len(row) for row in rows)
        padding = [[value] * (length - len(row)) for row in rows]
        sides = [(row, pad) if self.is_encoder_decoder else (pad, row) for row, pad in zip(rows, padding, strict=True)]
        return torch.tensor([left + right for left, right in sides], dtype=torch.long)

    def encode_answer(self, answer: str) -> list[int]:
        """Return the ids of an answer as it stands in a demonstration, without the separator."""
        return self._ids(self._format.answer_prefix + self._format.show_answer(answer))

    def decode_answers(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of generated answers up to where the separator, in a chat the end of the turn, begins."""
        cut = [_cut_at(list(ids), self._turn_end_ids) for ids in answers]
        texts, separator = self.tokenizer.batch_decode(cut, skip_special_tokens=True), self._format.separator
        return [(text.split(separator)[0] if separator else text).strip() for text in texts]

    @cached_property
    def query_end_ids(self) -> list[int]:
        """The ids behind every query of an encoder-decoder; none where the tokenizer puts none there."""
        return self._ids_around(is_target=False)[1] if self.is_encoder_decoder else []

    @cached_property
    def target_frame(self) -> tuple[list[int], list[int]]:
        """The ids before and behind every target of an encoder-decoder.

        Raises:
            ConfigError: The tokenizer has no end-of-text id.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                "Expected a tokenizer with an end-of-text token, at which an encoder-decoder's answer ends, got none: "
                "set tokenizer.eos_token."
            )
        before, behind = self._ids_around(is_target=True)
        return before, behind if end in behind else [*behind, end]

    def _ids_around(self, *, is_target: bool) -> tuple[list[int], list[int]]:
        """Return the special ids that the tokenizer puts before and behind a text."""
        name = "text_target" if is_target else "text"
        whole, bare = (self.tokenizer(**{name: "a"}, add_special_tokens=add).input_ids for add in (True, False))
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of plain text, without special tokens."""
        return self._ids(text)

    def encode_demonstrations(self, demonstrations: Sequence[Demonstration], *, warn: bool = True) -> EncodedTask:
        """Return the ids and anchors of one task's demonstrations within the config's budgets.

        Under `truncate` the demonstrations that no longer fit are left out; otherwise they open another chunk, and so
        does one beyond `max_demonstrations_per_chunk`. A demonstration longer than `max_demonstration_tokens` loses
        the end of its input.

        Args:
            demonstrations: One task's, at least one.
            warn: Say in a warning how many tokens were lost.
        """
        is_plain_text = all(demonstration.output is None for demonstration in demonstrations)
        opening_ids = self._bos_ids if is_plain_text else self.opening_ids
        window = self.config.max_distiller_tokens - len(opening_ids)
        groups: list[list[EncodedChunk]] = []
        num_kept, num_lost_tokens, is_full = 0, 0, False
        for demonstration in demonstrations:
            pieces, lost = self._encode_pieces(demonstration, window)
            num_lost_tokens += lost
            for piece in pieces:
                fits = groups and self._has_room(groups[-1], piece, window)
                is_full = is_full or bool(groups and not fits and self.config.overflow == "truncate")
                if is_full:
                    num_lost_tokens += len(piece.input_ids)
                elif fits:
                    groups[-1].append(piece)
                else:
                    groups.append([piece])
                num_kept += piece is pieces[0] and not is_full
        chunks = [_join_pieces(opening_ids, group) for group in groups]
        num_tokens = sum(len(chunk.input_ids) for chunk in chunks)
        if warn and num_lost_tokens:
            warnings.warn(
                f"{num_lost_tokens} of {num_tokens + num_lost_tokens} demonstration tokens were cut away: the budget "
                f"is {self.config.max_demonstration_tokens} a demonstration, "
                f"{self.config.max_distiller_tokens} in all. "
                'Give shorter or fewer demonstrations, raise the budgets, or use overflow="concat".',
                stacklevel=3,
            )
        return EncodedTask(chunks, num_kept, num_tokens, num_lost_tokens)

    @property
    def pad_token_id(self) -> int:
        """The id that fills masked places; which one does not matter."""
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id or 0

    @property
    def empty_prompt_ids(self) -> list[int]:
        """The ids of the prompt format around nothing: what stays when input and output are left out."""
        return self._ids(self._format.input_prefix) + self._output_prefix_ids + self._separator_ids

    @property
    def first_id(self) -> int | None:
        """The id that demonstrations begin with; None: with whatever the first input begins with."""
        return next(iter(self.opening_ids + self.empty_prompt_ids), None)

    @property
    def separator_ids(self) -> list[int]:
        """The ids that follow every demonstration."""
        return self._separator_ids

    @property
    def stop_token_id(self) -> int | None:
        """The id that ends an answer in a chat; None: its end has no id of its own, or the format is plain."""
        return self._turn_end_ids[0] if len(self._turn_end_ids) == 1 else None

    @property
    def opening_ids(self) -> list[int]:
        """What stands in front of the first demonstration."""
        return self._bos_ids if self._format.opening is None else self._ids(self._format.opening)

    @property
    def _bos_ids(self) -> list[int]:
        """The begin-of-text id, where the tokenizer of this model family puts one in front of a text."""
        empty = self.tokenizer("").input_ids
        return empty[:1] if empty[:1] == [self.tokenizer.bos_token_id] else []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text else []

    def _input_ids(self, text: str) -> tuple[list[int], int]:
        """Return the ids in front of an input and of the input, and how many of them no budget may cut away."""
        ids = self._ids(self._format.input_prefix + self._format.show_input(text))
        if self._format.opening is None:
            return ids, 0
        alike = [one == other for one, other in zip(ids, self._ids(self._format.input_prefix), strict=False)]
        return ids, [*alike, False].index(False)

    def _check_budgets(self) -> None:
        """Refuse budgets that the turns of a chat alone exceed; prefixes of one's own are cut with the input."""
        if self._format.opening is None:
            return
        num_around = len(self.empty_prompt_ids)
        for name, num_first in (("max_demonstration_tokens", 0), ("max_distiller_tokens", len(self.opening_ids))):
            budget, least = getattr(self.config, name), num_first + num_around + MIN_TEXT_TOKENS
            if budget < least:
                raise ConfigError(
                    f"{name}: expected room for {least} tokens or more, which the chat template writes around a "
                    f"demonstration of {MIN_TEXT_TOKENS}, got {budget}: raise it."
                )

    def _encode_pieces(self, demonstration: Demonstration, window: int) -> tuple[list[EncodedChunk], int]:
        if demonstration.output is None:
            return self._encode_plain_text(demonstration, window), 0
        piece, num_lost_tokens = self._encode_pair(demonstration, min(self.config.max_demonstration_tokens, window))
        return [piece], num_lost_tokens

    def _encode_pair(self, demonstration: Demonstration, budget: int) -> tuple[EncodedChunk, int]:
        head, num_around = self._input_ids(demonstration.input)
        tail, least = self._output_prefix_ids, max(num_around, 1)
        whole_answer = self.encode_answer(demonstration.output or "")
        answer = whole_answer[: max(budget - len(tail) - len(self._separator_ids) - least, 1)]
        kept = head[: max(budget - len(tail) - len(answer) - len(self._separator_ids), least)]
        ids = kept + tail + answer + self._separator_ids
        full = len(head) + len(tail) + len(whole_answer) + len(self._separator_ids)
        answer_start = len(kept) + len(tail)
        answer_end = answer_start + len(answer)
        anchors = [*range(answer_start - 1, answer_end), *([answer_end] if self._separator_ids else [])]
        cap = self.config.max_anchor_tokens_per_demonstration
        if len(anchors) > cap:
            anchors = anchors[: (cap + 1) // 2] + anchors[len(anchors) - cap // 2 :]
        anchors = anchors if self.config.anchor_tokens == "answers" else []
        return EncodedChunk(ids, anchors, (name_demonstration(demonstration),)), full - len(ids)

    def _has_room(self, group: Sequence[EncodedChunk], piece: EncodedChunk, window: int) -> bool:
        limit = self.config.max_demonstrations_per_chunk
        num_tokens = sum(len(other.input_ids) for other in group) + len(piece.input_ids)
        return num_tokens <= window and (limit is None or len(group) < limit)

    def _encode_plain_text(self, text: Demonstration, window: int) -> list[EncodedChunk]:
        """Cut a text into pieces that fit the window; its anchors are the tokens that end a sentence or a line."""
        ids, name = self._ids(text.input), name_demonstration(text)
        pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
        return [
            EncodedChunk(
                piece,
                [i for i, token in enumerate(piece) if self._is_sentence_end(token)]
                if self.config.anchor_tokens == "answers"
                else [],
                (f"{name}-{number}" if number else name,),
            )
            for number, piece in enumerate(pieces)
        ]

    def _is_sentence_end(self, token_id: int) -> bool:
        if token_id not in self._ends_sentence:
            self._ends_sentence[token_id] = bool(_SENTENCE_END.search(self.tokenizer.decode([token_id])))
        return self._ends_sentence[token_id]


def _join_pieces(opening_ids: Sequence[int], pieces: Sequence[EncodedChunk]) -> EncodedChunk:
    ids = list(opening_ids)
    anchors: list[int] = []
    for piece in pieces:
        anchors += [len(ids) + position for position in piece.anchor_positions]
        ids += piece.input_ids
    return EncodedChunk(ids, anchors, tuple(name for piece in pieces for name in piece.demonstrations))


def _cut_at(ids: list[int], end_ids: list[int]) -> list[int]:
    """Return the ids in front of the first place where others begin; all of them where there are no others."""
    places = (place for place in range(len(ids)) if end_ids and ids[place : place + len(end_ids)] == end_ids)
    return ids[: next(places, len(ids))]
