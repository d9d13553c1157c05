"""Push a distiller and one task's demonstrations to the Hub, and answer from what comes back.

    python examples/push_and_pull.py USER/NAME [--private] [--from-hub] [--tiny]

Needs a login: `hf auth login`, or HF_TOKEN. Two repositories are made, USER/NAME and USER/NAME-prompts.
"""

from __future__ import annotations

import argparse

from model_options import add_model_options, load_model

from mend_hf import CardFacts, DistilledDemonstrations, MendModel

FILMS = [("great film", "positive"), ("a bore", "negative"), ("I laughed all evening", "positive")]


def main() -> None:
    """Print what was pushed where, and what is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="USER/NAME of the distiller's repository")
    parser.add_argument("--private", action="store_true", help="make private repositories")
    add_model_options(parser)
    args = parser.parse_args()
    model = load_model(args)

    info = model.push_to_hub(args.repo_id, private=args.private, facts=CardFacts(license="other"))
    print(f"The distiller: {info.commit_url}")
    info = model.distill(FILMS).push_to_hub(f"{args.repo_id}-prompts", name="films", private=args.private)
    print(f"The demonstrations: {info.commit_url}")

    pulled = MendModel.from_pretrained(model.unload(), args.repo_id, model.tokenizer)
    films = DistilledDemonstrations.from_pretrained(f"{args.repo_id}-prompts", name="films")
    print(f"{films}\nmoving and funny: {pulled.answer(['moving and funny'], films, max_new_tokens=4)[0]}")


if __name__ == "__main__":
    main()
