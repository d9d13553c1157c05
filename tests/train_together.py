"""Trains a tiny distiller in as many processes as it is launched in.

`train_together.py FOLDER ROWS ACCUMULATION FORM`, and behind that `sharded` for weights sharded by FSDP2, `adamw` for
an optimizer with states, `stream` for text that is read as it comes, and `resume` to go on from FOLDER's checkpoint.
The main process writes FOLDER/result.json, the logged losses, and saves the distiller into FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from build_tokenizer import FOLDER
from tiny_models import build_tiny_model, ids_of
from transformers import AutoTokenizer

from mend_hf import MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.data.streaming import StreamingTextDataset

# Targets of very different lengths, so that a mean over processes is not the mean over tokens.
PAIRS = [
    ("great film", "positive positive positive positive positive"), ("a bore", "negative"),
    ("good food", "positive"), ("bad food", "negative negative negative"),
]  # fmt: skip
ROWS = [
    {"demonstrations": PAIRS[index % 3 :], "query": query, "target": target}
    for index, (query, target) in enumerate(PAIRS * 4)
]


TEXTS = [" ".join(["great film was good", "a bore", "very funny"][: 1 + number % 3] * 3) for number in range(10)]


def allow_sharding_on_cpus() -> None:
    """Let Accelerate use FSDP between CPUs, where it leaves it out though torch has it."""
    start = AcceleratorState.__init__

    def start_with_sharding(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = start_with_sharding


def main(folder: Path, rows_a_process: int, accumulation: int, form: str, *options: str) -> None:
    """Train for three steps of four rows and evaluate."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    config = MendConfig(num_virtual_tokens=3, lora_r=2, prefix_form=form)
    model = get_mend_model(build_tiny_model("llama", **ids_of(tokenizer)), config, tokenizer)
    sharding = {}
    if "sharded" in options:
        allow_sharding_on_cpus()
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    args = MendTrainingArguments(
        output_dir=str(folder / "out"), max_steps=3, per_device_train_batch_size=rows_a_process,
        optim="adamw_torch" if "adamw" in options else "sgd",
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_steps=1, seed=3, probe_steps=2, **sharding,
    )  # fmt: skip
    stream = StreamingTextDataset(TEXTS, tokenizer=tokenizer, min_tokens=4, num_rows=12, seed=1, shuffle_buffer=3)
    rows = stream if "stream" in options else ROWS
    trainer = MendTrainer(model=model, args=args, train_dataset=rows, eval_dataset=ROWS[:4], probe_dataset=ROWS[:3])
    trainer.train(resume_from_checkpoint="resume" in options)
    kinds = sorted({type(parameter).__name__ for parameter in model.base_model.parameters()})
    metrics = trainer.evaluate()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        probes = [entry for entry in trainer.state.log_history if "probe_kl" in entry]
        result = {"num_processes": args.world_size, "parameters": kinds, "logs": logs, "metrics": metrics}
        result["probes"] = probes
        (folder / "result.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
