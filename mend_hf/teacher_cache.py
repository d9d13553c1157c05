"""A teacher's top tokens on disk, for training rows that come again.

Shapes: B queries, P predicted tokens, C of them that count, K likeliest tokens.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mend_hf.errors import CheckpointError
from mend_hf.files import check_output_folder
from mend_hf.losses import IGNORE_INDEX, TopTokens

FILE_NAME = "teacher.sqlite"
_LOCK_SECONDS = 60.0


class TeacherCache:
    """One entry a query, found by the tokens that the teacher reads and by what decides its answer.

    The file is a SQLite database of safetensors, which several processes may fill at the same time and which a kill
    leaves whole.

    Args:
        folder: Made if need be.
        identity: What else the teacher's answers depend on: the base model, K, the temperature.

    Raises:
        CheckpointError: The folder cannot be written, or the file is no such database.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.path = check_output_folder(folder) / FILE_NAME
        self._identity = identity.encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS teacher (key BLOB PRIMARY KEY, tensors BLOB NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise CheckpointError(
                f"Expected a folder for the teacher's answers at {self.path.parent}, got {error}: give another one, "
                f"or remove {FILE_NAME} there."
            ) from error

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=_LOCK_SECONDS)

    def __len__(self) -> int:
        """Return the number of queries that are kept."""
        with closing(self._connect()) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM teacher").fetchone()[0])

    def keys_of(self, batch: Mapping[str, Tensor]) -> list[bytes]:
        """Return a key for every query of a batch; padding does not change it."""
        texts = _tokens_of(batch["teacher_input_ids"], batch["teacher_attention_mask"])
        queries = _tokens_of(batch["input_ids"], batch["attention_mask"])
        targets = _tokens_of(batch["labels"], batch["labels"] != IGNORE_INDEX)  # what an encoder-decoder predicts
        keys = []
        for index, task in enumerate(batch["query_task_rows"].tolist()):
            digest = hashlib.sha256(self._identity)
            for part in (texts[task], queries[index], targets[index]):
                digest.update(len(part).to_bytes(8, "little") + part)
            keys.append(digest.digest())
        return keys

    def get(self, keys: Sequence[bytes], mask: Tensor) -> TopTokens | None:
        """Return what is kept of a batch's queries, at the predicted tokens (B, P) that count; None if one is missing.

        Raises:
            CheckpointError: The file is damaged.
        """
        try:
            with closing(self._connect()) as connection:
                found = [
                    connection.execute("SELECT tensors FROM teacher WHERE key = ?", (key,)).fetchone() for key in keys
                ]
            if None in found:
                return None
            rows = [safetensors.torch.load(tensors) for (tensors,) in found]
        except (sqlite3.Error, safetensors.SafetensorError) as error:
            raise CheckpointError(f"Expected the teacher's answers in {self.path}, got {error}: remove it.") from error
        top_k = rows[0]["token_ids"].shape[-1]
        log_probs = torch.zeros(*mask.shape, top_k + 1, device=mask.device)
        token_ids = torch.zeros(*mask.shape, top_k, dtype=torch.long, device=mask.device)
        log_probs[mask] = torch.cat([row["log_probs"] for row in rows]).to(mask.device)
        token_ids[mask] = torch.cat([row["token_ids"] for row in rows]).to(mask.device, torch.long)
        return TopTokens(log_probs, token_ids)

    def put(self, keys: Sequence[bytes], top: TopTokens, mask: Tensor) -> None:
        """Keep the top tokens of a batch's queries, at the predicted tokens (B, P) that count.

        Raises:
            CheckpointError: They cannot be written, e.g. because the disk is full.
        """
        entries = []
        for index, key in enumerate(keys):
            counts = mask[index]
            tensors = {
                "log_probs": top.log_probs[index][counts].cpu(),  # [C, K + 1]
                "token_ids": top.token_ids[index][counts].int().cpu(),  # [C, K]
            }
            entries.append((key, safetensors.torch.save(tensors)))
        try:
            with closing(self._connect()) as connection, connection:
                connection.executemany("INSERT OR IGNORE INTO teacher VALUES (?, ?)", entries)
        except sqlite3.Error as error:
            raise CheckpointError(
                f"Expected room to keep the teacher's answers in {self.path}, got {error}: free some, or train "
                "without teacher_cache_dir."
            ) from error


def _tokens_of(ids: Tensor, mask: Tensor) -> list[bytes]:
    """Return the tokens of every row that count."""
    return [row[counts].cpu().numpy().tobytes() for row, counts in zip(ids, mask.bool(), strict=True)]
