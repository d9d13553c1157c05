"""What is left to look at when a loss is not a number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mend_hf.files import write_folder, write_json

TENSORS_NAME = "nonfinite_batch.safetensors"
TEXT_NAME = "nonfinite_batch.json"


def write_batch(
    output_dir: str | Path,
    batch: Mapping[str, Tensor],
    losses: Mapping[str, float],
    step: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Path:
    """Write the batch whose loss is not finite, as tensors and, where there is a tokenizer, as text.

    Returns:
        The file of tensors.
    """
    record: dict[str, object] = {"step": step, "losses": {name: str(value) for name, value in losses.items()}}
    if tokenizer is not None:
        ids = [name for name in ("teacher_input_ids", "input_ids") if name in batch]
        record |= {name: tokenizer.batch_decode(batch[name]) for name in ids}
    with write_folder(output_dir) as folder:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in batch.items()}, folder / TENSORS_NAME)
        write_json(folder / TEXT_NAME, record)
    return Path(output_dir) / TENSORS_NAME
