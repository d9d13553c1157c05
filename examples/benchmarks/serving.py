"""What a query costs behind a prefix, and what the wrapper adds to it: four ways to serve SmolLM2, in the same rounds.

    python examples/benchmarks/serving.py

(a) the demonstrations' text is read again for every query, (b) it is kept in a cache, (c) MEND, (d) the floor: a bare
copy of the base model, never wrapped, generates from a cache that holds the slots of (c). (c') is (c) with a task of
its own in every row.

Every round runs all of them in another order; times are medians over the rounds, ratios medians of the rounds' ratios,
so that other work on the machine slows both sides. The last line is `RESULT serving_overhead=... icl_speedup=...
mixed_tasks_ratio=... distil_ratio=...`: (c)/(d), the worse of the two batch sizes, and (a)/(c) of one query, both to
the first token; (c')/(c); and distilling against one forward pass of the distiller over as many tokens.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from mend_hf import Demonstration, DistilledDemonstrations, MendModel
from mend_hf.data.metaicl import load_tasks

sys.path.append(str(Path(__file__).parents[1]))
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
BATCH_SIZES = (1, 8)
MANY_TOKENS = 9  # generated for the time per token, which is that of all but the first
QUERY = "The printer on the second floor is out of paper again."

Step = Callable[[], object]


def pick_demonstrations(model: MendModel, num_tokens: int, seed: int) -> list[Demonstration]:
    """Return as many of the examples' demonstrations, in an order that the seed fixes, as `num_tokens` hold."""
    pairs = [Demonstration(e.input, e.output) for task in load_tasks(EXAMPLES / "data").values() for e in task]
    random.Random(seed).shuffle(pairs)
    lengths = [model.prompt.encode_demonstrations([pair]).num_tokens for pair in pairs]
    num_kept = sum(sum(lengths[: end + 1]) <= num_tokens for end in range(len(pairs)))
    return pairs[:num_kept]


def fill_cache(model: MendModel, distilled: DistilledDemonstrations, batch_size: int) -> DynamicCache:
    """Return a cache as anyone would fill it who has the keys and values of one task and uses transformers alone."""
    cache = DynamicCache(config=model.base_model.config)
    for layer, (keys, values) in enumerate(zip(distilled.prefix.keys, distilled.prefix.values, strict=True)):
        cache.update(keys.expand(batch_size, -1, -1, -1), values.expand(batch_size, -1, -1, -1), layer)
    return cache


def make_routes(
    bare: PreTrainedModel, model: MendModel, tasks: list[list[Demonstration]], ids: torch.Tensor, settings: dict
) -> tuple[dict[str, Step], dict[str, float]]:
    """Return the routes, each of which generates for a batch of queries, and the bytes of their prefixes."""
    batch_size = ids.shape[0]
    text, distilled = model.read(tasks[0]), model.distill(tasks[0])
    each_its_own = model.distill(tasks)
    [chunk] = model.prompt.encode_demonstrations(tasks[0]).chunks
    whole = torch.cat([torch.tensor([chunk.input_ids], device=ids.device).expand(batch_size, -1), ids], dim=1)
    covering = ids.new_ones(batch_size, distilled.num_slots + ids.shape[1])

    def read_again() -> None:
        bare.generate(whole, attention_mask=torch.ones_like(whole), **settings)

    def floor() -> None:
        cache = fill_cache(model, distilled, batch_size)
        bare.generate(ids, attention_mask=covering, past_key_values=cache, **settings)

    routes: dict[str, Step] = {
        "(a) text, read every time": read_again,
        "(b) text, kept in a cache": lambda: model.generate(ids, demonstrations=text, **settings),
        "(c) MEND": lambda: model.generate(ids, demonstrations=distilled, **settings),
        "(d) floor": floor,
    }
    sizes = dict.fromkeys(routes, distilled.num_bytes) | {
        "(a) text, read every time": 0,
        "(b) text, kept in a cache": text.num_bytes,
    }
    if batch_size == len(tasks):
        name = f"(c') MEND, {batch_size} tasks"
        routes[name] = lambda: model.generate(ids, demonstrations=each_its_own, **settings)
        sizes[name] = each_its_own.num_bytes
    return routes, sizes


def make_distilling(model: MendModel, demonstrations: list[Demonstration]) -> dict[str, Step]:
    """Return distilling, and the forward pass of the distiller that it cannot do without."""
    [chunk] = model.prompt.encode_demonstrations(demonstrations).chunks
    num_vectors = model.mend_config.num_virtual_tokens
    ids = torch.tensor([chunk.input_ids + chunk.input_ids[:num_vectors]], device=model.device)

    @torch.no_grad()
    def forward() -> None:
        with model.distiller.adapter_on():
            model.base_model.base_model(ids, use_cache=True)

    return {"distilling": lambda: model.distill(demonstrations), "one forward": forward}


def time_rounds(steps: dict[str, Step], num_rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every step in every round; the first round is not counted."""
    order = list(steps)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        random.shuffle(order)
        for name in order:
            start = _now()
            steps[name]()
            if number:
                times[name].append(1000 * (_now() - start))
    return times


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def compare(times: dict[str, list[float]], one: str, other: str) -> float:
    """Return the median of the rounds' ratios of two steps whose names begin so."""
    pairs = [next(times[name] for name in times if name.startswith(start)) for start in (one, other)]
    return statistics.median(a / b for a, b in zip(*pairs, strict=True))


def main() -> None:
    """Print the table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--distiller", default=str(EXAMPLES / "distillers" / "smollm2-135m-kv"), help="folder or Hub id"
    )
    parser.add_argument("--num-tokens", type=int, default=900, help="tokens of the demonstrations, at most")
    parser.add_argument("--num-rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile the base model; worth it on a GPU")
    args = parser.parse_args()
    random.seed(0)
    base, tokenizer = load_smollm2()
    if torch.accelerator.is_available():
        base.to(torch.accelerator.current_accelerator())
    bare = copy.deepcopy(base)
    model = MendModel.from_pretrained(base, args.distiller, tokenizer)
    if args.compile:
        bare.forward, base.forward = (torch.compile(each.forward, dynamic=True) for each in (bare, base))
    tasks = [pick_demonstrations(model, args.num_tokens, seed) for seed in range(max(BATCH_SIZES))]
    query = model.tokenize(QUERY)["input_ids"]
    table = Table(
        "", *(f"batch {size}: {unit}" for size in BATCH_SIZES for unit in ("first, ms", "next, ms")), "prefix MB"
    )
    cells: dict[str, list[str]] = {}
    overheads, speedup, mixed, megabytes = [], 0.0, 0.0, {}
    for size in BATCH_SIZES:
        ids, lengths = query.expand(size, -1), {}
        for number in (1, MANY_TOKENS):
            settings = {"max_new_tokens": number, "min_new_tokens": number, "do_sample": False, "pad_token_id": 0}
            routes, sizes = make_routes(bare, model, tasks, ids, settings)
            lengths[number] = time_rounds(routes, args.num_rounds)
            megabytes |= {name: sizes[name] / 1e6 for name in routes}
        first = lengths[1]
        for name, times in first.items():
            rest = (statistics.median(lengths[MANY_TOKENS][name]) - statistics.median(times)) / (MANY_TOKENS - 1)
            cells.setdefault(name, [""] * 2 * BATCH_SIZES.index(size)).extend(
                [f"{statistics.median(times):.1f}", f"{rest:.1f}"]
            )
        overheads.append(compare(first, "(c) ", "(d)"))
        if size == 1:
            speedup = compare(first, "(a)", "(c) ")
        else:
            mixed = compare(first, "(c')", "(c) ")
    for name, values in cells.items():
        table.add_row(name, *values, f"{megabytes[name]:.1f}")
    distilling = time_rounds(make_distilling(model, tasks[0]), args.num_rounds)
    console = Console()
    console.print(table)
    for name, times in distilling.items():
        console.print(f"{name}: {statistics.median(times):.0f} ms")
    ratios = {
        "serving_overhead": max(overheads),
        "icl_speedup": speedup,
        "mixed_tasks_ratio": mixed,
        "distil_ratio": compare(distilling, "distilling", "one forward"),
    }
    print("RESULT", *(f"{name}={value:.3f}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
