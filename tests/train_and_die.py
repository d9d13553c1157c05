"""Trains a tiny distiller for 8 steps and kills itself at a given moment: `train_and_die.py FOLDER MOMENT STEP`.

MOMENT is "step" (as step STEP begins), "save" (while the optimizer of checkpoint STEP is written) or "never".
Every loss is appended to FOLDER/losses.jsonl as it is logged.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from build_tokenizer import FOLDER
from tiny_models import build_tiny_model, ids_of
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model

PAIRS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
ROWS = [
    {"demonstrations": PAIRS[index % 3 :], "query": query, "target": target}
    for index, (query, target) in enumerate(PAIRS * 3)
]


class LossLog(TrainerCallback):
    """Writes every logged loss at once, and dies at the beginning of a step."""

    def __init__(self, path: Path, last_step: int | None) -> None:
        self.path = path
        self.last_step = last_step

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **{k: logs[k] for k in ("loss", "kd_loss")}}) + "\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.last_step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, moment: str, step: int) -> None:
    """Train, going on from the last checkpoint if there is one."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = MendConfig(num_virtual_tokens=3, lora_r=2, lora_dropout=0.2)
    model = get_mend_model(build_tiny_model("llama", **ids_of(tokenizer)), config, tokenizer)
    args = MendTrainingArguments(
        output_dir=str(folder), max_steps=8, save_steps=2, save_total_limit=2, per_device_train_batch_size=1,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=True, seed=3,
    )  # fmt: skip
    save = torch.save

    def die_while_saving(value, path, *rest, **kwargs):
        if f"checkpoint-{step}" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, *rest, **kwargs)

    if moment == "save":
        torch.save = die_while_saving
    callback = LossLog(folder / "losses.jsonl", step if moment == "step" else None)
    folder.mkdir(exist_ok=True)
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS, callbacks=[callback])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
