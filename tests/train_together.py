"""Trains a tiny distiller in as many processes as it is launched in: `train_together.py FOLDER ROWS ACCUMULATION`.

The main process writes FOLDER/result.json, the logged losses, and saves the distiller into FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from build_tokenizer import FOLDER
from tiny_models import build_tiny_model, ids_of
from transformers import AutoTokenizer

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model

# Targets of very different lengths, so that a mean over processes is not the mean over tokens.
PAIRS = [
    ("great film", "positive positive positive positive positive"), ("a bore", "negative"),
    ("good food", "positive"), ("bad food", "negative negative negative"),
]  # fmt: skip
ROWS = [
    {"demonstrations": PAIRS[index % 3 :], "query": query, "target": target}
    for index, (query, target) in enumerate(PAIRS * 4)
]


def main(folder: Path, rows_a_process: int, accumulation: int) -> None:
    """Train for three steps of four rows and evaluate."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = MendConfig(num_virtual_tokens=3, lora_r=2)
    model = get_mend_model(build_tiny_model("llama", **ids_of(tokenizer)), config, tokenizer)
    args = MendTrainingArguments(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=rows_a_process, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_steps=3, seed=3, probe_steps=2,
    )  # fmt: skip
    trainer = MendTrainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], probe_dataset=ROWS[:3])
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        probes = [entry for entry in trainer.state.log_history if "probe_kl" in entry]
        result = {"num_processes": args.world_size, "logs": logs, "probes": probes, "metrics": metrics}
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
