"""Push a distiller and one task's demonstrations to the Hub, and answer from what comes back.

    python examples/push_and_pull.py USER/NAME [--private] [--from-hub] [--tiny]

Needs a login: `hf auth login`, or HF_TOKEN. Two repositories are made, USER/NAME and USER/NAME-prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny import load_tiny
from weights import load_smollm2

from mend_hf import CardFacts, DistilledDemonstrations, MendConfig, MendModel, get_mend_model

HERE = Path(__file__).parent
FILMS = [("great film", "positive"), ("a bore", "negative"), ("I laughed all evening", "positive")]


def main() -> None:
    """Print what was pushed where, and what is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="USER/NAME of the distiller's repository")
    parser.add_argument("--distiller", default=str(HERE / "distillers" / "smollm2-135m-kv"), help="folder or Hub id")
    parser.add_argument("--private", action="store_true", help="make private repositories")
    parser.add_argument("--from-hub", action="store_true", help="load SmolLM2 by its Hub name, not from the package")
    parser.add_argument("--tiny", action="store_true", help="a tiny model without training: seconds")
    args = parser.parse_args()
    if args.tiny:
        base, tokenizer = load_tiny()
        model = get_mend_model(base, MendConfig(num_virtual_tokens=4), tokenizer).eval()
    else:
        base, tokenizer = load_smollm2(args.from_hub)
        model = MendModel.from_pretrained(base, args.distiller, tokenizer)

    info = model.push_to_hub(args.repo_id, private=args.private, facts=CardFacts(license="other"))
    print(f"The distiller: {info.commit_url}")
    info = model.distill(FILMS).push_to_hub(f"{args.repo_id}-prompts", name="films", private=args.private)
    print(f"The demonstrations: {info.commit_url}")

    pulled = MendModel.from_pretrained(model.unload(), args.repo_id, tokenizer)
    films = DistilledDemonstrations.from_pretrained(f"{args.repo_id}-prompts", name="films")
    print(f"{films}\nmoving and funny: {pulled.answer(['moving and funny'], films, max_new_tokens=4)[0]}")


if __name__ == "__main__":
    main()
