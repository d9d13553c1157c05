"""What is left to look at when a loss or a gradient is not a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mend_hf.files import write_folder, write_json

TENSORS_NAME = "nonfinite_batch.safetensors"
TEXT_NAME = "nonfinite_batch.json"


def write_batch(
    output_dir: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    values: Mapping[str, float],
    step: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Path:
    """Write the batches whose loss or gradient is not finite, as tensors and, where there is a tokenizer, as text.

    Returns:
        The file of tensors, `0.input_ids` and so on, by the batch's number.
    """
    record: dict[str, object] = {"step": step, "values": {name: str(value) for name, value in values.items()}}
    if tokenizer is not None:
        record["batches"] = [
            {name: tokenizer.batch_decode(batch[name]) for name in ("teacher_input_ids", "input_ids") if name in batch}
            for batch in batches
        ]
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous()
        for number, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    with write_folder(output_dir) as folder:
        save_file(tensors, folder / TENSORS_NAME)
        write_json(folder / TEXT_NAME, record)
    return Path(output_dir) / TENSORS_NAME
