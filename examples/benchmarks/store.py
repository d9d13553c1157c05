"""How long a `DemonstrationStore` takes to find a task, and whether it grows.

    python examples/benchmarks/store.py

Fills a folder with tasks of random keys and values in SmolLM2's shape (no weights are needed), asks for tasks at
random, some from memory (warm) and some from disk (cold), and counts what the process holds after many lookups.

The last line is `RESULT warm_p99_ms=... cold_p99_ms=... growth_mb=...`; the growth is that of the process's memory
from the first tenth of the lookups on.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig

from mend_hf import DemonstrationStore, DistilledDemonstrations
from mend_hf.prefix import KeyValuePrefix
from mend_hf.provenance import ChunkRecord, Provenance


def main() -> None:
    """Fill, ask, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tasks", type=int, default=1000)
    parser.add_argument("--num-slots", type=int, default=100)
    parser.add_argument("--max-bytes", type=int, default=2**30)
    parser.add_argument("--num-lookups", type=int, default=100_000)
    parser.add_argument("--cold-fraction", type=float, default=0.02, help="of the lookups, for tasks not in memory")
    parser.add_argument("--tiny", action="store_true", help="few small tasks, in seconds")
    args = parser.parse_args()
    # SmolLM2-135M: 30 layers of 3 key/value heads of width 64.
    shape = LlamaConfig(num_hidden_layers=30, num_key_value_heads=3, num_attention_heads=9, hidden_size=576)
    if args.tiny:
        args.num_tasks, args.num_slots, args.max_bytes, args.num_lookups = 20, 4, 10 * 4 * 30 * 2 * 3 * 64 * 2, 1000
    with tempfile.TemporaryDirectory() as folder:
        store = DemonstrationStore(folder, max_bytes=args.max_bytes)
        demonstrations = make(shape, args.num_slots)
        for number in track(range(args.num_tasks), "filling", transient=True, disable=args.tiny):
            store.add(f"task-{number}", demonstrations)
        measure(store, args)


def make(shape: LlamaConfig, num_slots: int) -> DistilledDemonstrations:
    """Return demonstrations of one task with random keys and values in bfloat16."""
    size = (1, shape.num_key_value_heads, num_slots, shape.hidden_size // shape.num_attention_heads)
    layers = range(shape.num_hidden_layers)
    keys, values = (tuple(torch.randn(size).bfloat16() for _ in layers) for _ in range(2))
    prefix = KeyValuePrefix(keys, values, torch.ones(1, num_slots, dtype=torch.bool), torch.tensor([num_slots]))
    provenance = Provenance(
        base_model_name_or_path=None,
        base_model_fingerprint={},
        distiller_name_or_path=None,
        distiller_hash=None,
        prompt_format={},
        chunks=[[ChunkRecord(demonstrations=["random"], num_tokens=num_slots, num_lost_tokens=0)]],
    )
    return DistilledDemonstrations(prefix, provenance)


def measure(store: DemonstrationStore, args: argparse.Namespace) -> None:
    """Ask for tasks, and print how long it took."""
    rng, console = random.Random(0), Console()
    num_held = min(args.max_bytes // store["task-0"].num_bytes, args.num_tasks)
    order = list(range(args.num_tasks))  # the last ones asked for at the end, as in the store
    for number in order:
        _ = store[f"task-{number}"]
    warm, cold, start_bytes = [], [], 0
    for lookup in track(range(args.num_lookups), "asking", transient=True, disable=args.tiny):
        is_cold = num_held < args.num_tasks and rng.random() < args.cold_fraction
        place = rng.randrange(args.num_tasks - num_held) if is_cold else rng.randrange(-num_held, 0)
        number = order.pop(place)
        order.append(number)
        start = time.perf_counter()
        _ = store[f"task-{number}"]
        (cold if is_cold else warm).append(1000 * (time.perf_counter() - start))
        if lookup == args.num_lookups // 10:
            start_bytes = read_resident_bytes()
    growth = (read_resident_bytes() - start_bytes) / 1e6
    console.print(f"{args.num_tasks} tasks of {store['task-0'].num_bytes / 1e6:.1f} MB, {num_held} held in memory")
    quantiles = []
    for name, times in (("warm", warm), ("cold", cold or [0.0])):
        times.sort()
        quantiles.append(times[int(0.99 * (len(times) - 1))])
        console.print(
            f"{name}: {len(times)} lookups, median {times[len(times) // 2]:.3f} ms, p99 {quantiles[-1]:.3f} ms"
        )
    print(f"RESULT warm_p99_ms={quantiles[0]:.3f} cold_p99_ms={quantiles[1]:.2f} growth_mb={growth:.1f}")


def read_resident_bytes() -> int:
    """Return the bytes of memory that this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


if __name__ == "__main__":
    main()
