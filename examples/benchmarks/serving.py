"""What a query costs behind a prefix, and what the wrapper adds to it: four ways to serve SmolLM2, in the same rounds.

    python examples/benchmarks/serving.py

(a) the demonstrations' text is read again for every query, (b) it is kept in a cache, (c) MEND, (d) the floor: a bare
copy of the base model, never wrapped, generates from a cache that holds the slots of (c). (c') is (c) with a task of
its own in every row.

Every round runs all of them in another order; times are medians over the rounds, ratios medians of the rounds' ratios,
so that other work on the machine slows both sides. The last line is `RESULT serving_overhead=... icl_speedup=...
mixed_tasks_ratio=... distil_ratio=...`: (c)/(d), the worse of the two batch sizes, in rounds of their own, and (a)/(c)
of one query, both to the first token; (c')/(c); and distilling against one forward pass of the distiller over as many
tokens.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from mend_hf import Demonstration, DistilledDemonstrations, MendModel
from mend_hf.architectures import CACHE_NAME
from mend_hf.data.metaicl import load_tasks

sys.path.append(str(Path(__file__).parents[1]))
from weights import load_smollm2

EXAMPLES = Path(__file__).parents[1]
BATCH_SIZES = (1, 8)
AGAIN, KEPT, MEND, FLOOR, MIXED = (
    "(a) text, read every time",
    "(b) text, kept in a cache",
    "(c) MEND",
    "(d) floor",
    f"(c') MEND, {max(BATCH_SIZES)} tasks",
)
PAIR_ROUNDS = 8  # as many rounds more for (c) against (d), which differ by less than one round's noise
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


@dataclass
class Prefixes:
    """The prefixes that are compared, made once: of one task as text and distilled, and of every task distilled."""

    text: DistilledDemonstrations
    task: DistilledDemonstrations
    tasks: DistilledDemonstrations
    text_ids: list[int]

    @classmethod
    def make(cls, model: MendModel, tasks: list[list[Demonstration]]) -> Prefixes:
        """Read and distil the demonstrations of the first task, and distil all of them."""
        [chunk] = model.prompt.encode_demonstrations(tasks[0]).chunks
        return cls(model.read(tasks[0]), model.distill(tasks[0]), model.distill(tasks), chunk.input_ids)


def make_routes(
    bare: PreTrainedModel, model: MendModel, prefixes: Prefixes, ids: torch.Tensor, num_new_tokens: int
) -> dict[str, Step]:
    """Return the routes, each of which generates so many tokens for a batch of queries."""
    batch_size = ids.shape[0]
    text_ids = torch.tensor([prefixes.text_ids], device=ids.device).expand(batch_size, -1)
    whole = torch.cat([text_ids, ids], dim=1)
    covering = ids.new_ones(batch_size, prefixes.task.num_slots + ids.shape[1])
    settings = dict.fromkeys(("max_new_tokens", "min_new_tokens"), num_new_tokens)
    settings |= {"do_sample": False, "pad_token_id": 0}

    def read_again() -> None:
        bare.generate(whole, attention_mask=torch.ones_like(whole), **settings)

    def floor() -> None:
        cache = fill_cache(model, prefixes.task, batch_size)
        bare.generate(ids, attention_mask=covering, **{CACHE_NAME: cache}, **settings)

    routes: dict[str, Step] = {
        AGAIN: read_again,
        KEPT: lambda: model.generate(ids, demonstrations=prefixes.text, **settings),
        MEND: lambda: model.generate(ids, demonstrations=prefixes.task, **settings),
        FLOOR: floor,
    }
    if batch_size == len(prefixes.tasks):
        routes[MIXED] = lambda: model.generate(ids, demonstrations=prefixes.tasks, **settings)
    return routes


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
    """Return the median of the rounds' ratios of two steps."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def to_table(first: dict[int, dict], many: dict[int, dict], prefixes: Prefixes) -> Table:
    """Return milliseconds to the first token and for each of the next ones, by batch size, and the prefixes' sizes."""
    units = [f"batch {size}: {unit}" for size in BATCH_SIZES for unit in ("first, ms", "next, ms")]
    table = Table("", *units, "prefix MB")
    sizes = {AGAIN: 0, KEPT: prefixes.text.num_bytes, MIXED: prefixes.tasks.num_bytes}
    for name in (AGAIN, KEPT, MEND, FLOOR, MIXED):
        cells = []
        for size in BATCH_SIZES:
            if name not in first[size]:
                cells += ["", ""]
                continue
            start, end = (statistics.median(times[size][name]) for times in (first, many))
            cells += [f"{start:.1f}", f"{(end - start) / (MANY_TOKENS - 1):.1f}"]
        table.add_row(name, *cells, f"{sizes.get(name, prefixes.task.num_bytes) / 1e6:.1f}")
    return table


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
    prefixes, query = Prefixes.make(model, tasks), model.tokenize(QUERY)["input_ids"]
    first, many = (
        {
            size: time_rounds(make_routes(bare, model, prefixes, query.expand(size, -1), number), args.num_rounds)
            for size in BATCH_SIZES
        }
        for number in (1, MANY_TOKENS)
    )
    overheads = []
    for size in BATCH_SIZES:
        routes = make_routes(bare, model, prefixes, query.expand(size, -1), 1)
        pair = {name: routes[name] for name in (MEND, FLOOR)}
        overheads.append(compare(time_rounds(pair, PAIR_ROUNDS * args.num_rounds), MEND, FLOOR))
    distilling = time_rounds(make_distilling(model, tasks[0]), args.num_rounds)
    console = Console()
    console.print(to_table(first, many, prefixes))
    for name, times in distilling.items():
        console.print(f"{name}: {statistics.median(times):.0f} ms")
    ratios = {
        "serving_overhead": max(overheads),
        "icl_speedup": compare(first[1], AGAIN, MEND),
        "mixed_tasks_ratio": compare(first[max(BATCH_SIZES)], MIXED, MEND),
        "distil_ratio": compare(distilling, "distilling", "one forward"),
    }
    print("RESULT", *(f"{name}={value:.3f}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
