"""One of two processes fails: `train_and_fail.py FOLDER save|stop|skip RANK`; writes FOLDER/result-RANK.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from build_tokenizer import FOLDER
from tiny_models import build_tiny_model, ids_of
from train_together import ROWS
from transformers import AutoTokenizer

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import MendError


def main(folder: Path, failure: str, rank: int) -> None:
    """Train for two steps, and keep the process alive afterwards, as a notebook or a handler of errors would."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = get_mend_model(build_tiny_model("llama", **ids_of(tokenizer)), MendConfig(lora_r=2), tokenizer)
    args = MendTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_steps=2, nonfinite_loss="skip" if failure == "skip" else "stop",
    )  # fmt: skip
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS)
    if args.process_index == rank:
        if failure == "save":
            trainer._save_rng_state = fail
        else:
            model.register_forward_hook(make_nan)
    result = {"error": "", "skipped": 0}
    try:
        trainer.train()
        result["skipped"] = max(entry.get("skipped_batches", 0) for entry in trainer.state.log_history)
    except MendError as error:
        result["error"] = f"{type(error).__name__}: {error}"
    (folder / f"result-{args.process_index}.json").write_text(json.dumps(result))
    while len(list(folder.glob("result-*.json"))) < args.world_size:  # a process that ends would release the other
        time.sleep(0.1)
    trainer.accelerator.end_training()


def fail(*_: Any) -> None:
    """Fail as a full disk does."""
    raise OSError("disk full")


def make_nan(_: Any, __: Any, outputs: Any) -> None:
    """Make the student's predictions no numbers."""
    outputs.logits = outputs.logits * float("nan")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
