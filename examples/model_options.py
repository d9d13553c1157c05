"""The model of an example: SmolLM2 with the distiller of this folder, or a tiny one, as the command line asks."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tiny import load_tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from weights import load_smollm2

from mend_hf import MendConfig, MendModel, get_mend_model

DISTILLER = Path(__file__).parent / "distillers" / "smollm2-135m-kv"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Give a command line the options that `load_model` reads."""
    parser.add_argument("--distiller", default=str(DISTILLER), help="folder or Hub id")
    parser.add_argument("--from-hub", action="store_true", help="load SmolLM2 by its Hub name, not from the package")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model without training: seconds, no network, answers of no meaning"
    )


def load_base(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model and its tokenizer."""
    return load_tiny() if args.tiny else load_smollm2(args.from_hub)


def wrap(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, **settings: Any
) -> MendModel:
    """Return the base model with its distiller.

    Args:
        base: From `load_base`.
        tokenizer: Its tokenizer.
        args: What the command line asked for.
        **settings: Of `MendConfig`, in place of the distiller's own.
    """
    if args.tiny:
        return get_mend_model(base, MendConfig(num_virtual_tokens=4, **settings), tokenizer).eval()
    config = dataclasses.replace(MendConfig.from_pretrained(args.distiller), **settings)
    return MendModel.from_pretrained(base, args.distiller, tokenizer, config=config)


def load_model(args: argparse.Namespace) -> MendModel:
    """Return the base model with its distiller, in one go."""
    return wrap(*load_base(args), args)
