"""Distil sixteen demonstrations and write down the requests by which a vLLM server answers queries from them.

    python examples/vllm_export.py --distiller FOLDER [--from-hub] [--url http://localhost:8000] [--tiny]

The distiller has to be one of the embeds form, and the server has to run the same base model:

    vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-prompt-embeds
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from tiny import load_tiny
from weights import NAME, load_smollm2

from mend_hf import MendConfig, MendModel, get_mend_model
from mend_hf.data.metaicl import load_tasks
from mend_hf.integrations.vllm import make_completion_request, make_prompt_embeds

DATA = Path(__file__).parent / "data"


def main() -> None:
    """Write one request a line and, where a server is named, print what it answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distiller", help="folder or Hub id of a distiller trained with --prefix-form embeds")
    parser.add_argument("--output-dir", default="outputs/vllm", help="where requests.jsonl is written")
    parser.add_argument("--url", help="of a server that is asked at once")
    parser.add_argument("--dtype", default="bfloat16", help="in which the server runs the model")
    parser.add_argument("--from-hub", action="store_true", help="load SmolLM2 by its Hub name, not from the package")
    parser.add_argument("--tiny", action="store_true", help="a tiny model without training: seconds, no network")
    args = parser.parse_args()
    if args.tiny:
        base, tokenizer = load_tiny()
        model = get_mend_model(base, MendConfig(prefix_form="embeds", num_virtual_tokens=4), tokenizer).eval()
    elif args.distiller:
        base, tokenizer = load_smollm2(args.from_hub)
        model = MendModel.from_pretrained(base, args.distiller, tokenizer)
    else:
        parser.error("expected --distiller or --tiny")

    examples = load_tasks(DATA, split="train")["support_tickets"][:16]
    distilled = model.distill([(example.input, example.output) for example in examples])
    stop = model.mend_config.demonstration_separator
    queries = [example.input for example in load_tasks(DATA, split="test")["support_tickets"][:4]]
    path = Path(args.output_dir) / "requests.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as lines:
        for query in queries:
            embeds = make_prompt_embeds(model, distilled, query).to(getattr(torch, args.dtype))
            request = make_completion_request(embeds, NAME, max_tokens=8, stop=stop)
            lines.write(json.dumps(request) + "\n")
            print(f"{query}\n  {ask(args.url, request) if args.url else f'{len(embeds)} vectors'}")


def ask(url: str, request: dict[str, Any]) -> str:
    """Return what a server answers to one request."""
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/completions", body, headers)) as response:
        return str(json.load(response)["choices"][0]["text"]).strip()


if __name__ == "__main__":
    main()
