"""The shape of the package: who imports whom, what only one file may do, and what importing it must not do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mend_hf

PACKAGE = Path(mend_hf.__file__).parent
MAX_LINES = 400

# From the ground up: a module imports only what stands on a lower line. A name that ends in "/" is a folder.
LAYERS = (
    ("errors",),
    ("losses", "files", "architectures", "adapter_switch", "progress", "stopwatch"),
    ("saved_pair",),
    ("config", "fingerprint", "sharding", "guards", "messages"),
    ("cards", "checkpoints", "curves", "demonstrations", "nonfinite", "passes", "prompt_format"),
    ("prompt_encoder", "upload"),
    ("demonstration_batch", "prefix", "provenance"),
    ("caches", "library", "pooling", "projection", "recompute"),
    ("distiller", "routes/"),
    ("artifact",),
    ("hub", "binding", "store"),
    ("wrapper", "pull", "scoring"),
    ("data/", "model"),
    ("auto", "teacher_cache", "training_args"),
    ("auto_classes", "teacher"),
    ("objective",),
    ("loss_log", "probe", "resumable"),
    ("watched",),
    ("pushing",),
    ("trainer",),
    ("evaluation/",),
    ("integrations/", "pipeline"),
    ("cli/",),
)
# Modules of these folders may also import each other, in any order that has no circle.
OPEN_FOLDERS = ("routes/", "data/", "evaluation/", "cli/")
HEIGHTS = {name: height for height, names in enumerate(LAYERS) for name in names}

CONCRETE_MODEL = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model|Config)$")
GENERAL_CLASSES = {"GenerationConfig", "MendConfig", "MendModel", "PreTrainedConfig", "PreTrainedModel"}
PICKLE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


@cache
def module_files() -> dict[str, str]:
    """The text of every module but the public face, by its dotted name inside the package."""
    texts = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def imports_of(module: str, text: str) -> Iterator[str]:
    """The modules of this package that a module imports, wherever in the file: "" is the package itself."""
    known = module_files()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["mend_hf", *module.split(".")][: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [
                f"{source}.{alias.name}" if _is_module(source, alias.name, known) else source for alias in node.names
            ]
            if source == "mend_hf" and all(alias.name == "__version__" for alias in node.names):
                names = []
        else:
            continue
        yield from (name.removeprefix("mend_hf").removeprefix(".") for name in names if re.match(r"mend_hf\b", name))


def _is_module(source: str, name: str, known: dict[str, str]) -> bool:
    return f"{source}.{name}".removeprefix("mend_hf.") in known


def height_name(module: str) -> str:
    folder = module.split(".")[0] + "/"
    return folder if folder in HEIGHTS else module


def wrong_arrows(module: str, text: str) -> list[str]:
    """The imports of a module that do not point downwards, as sentences."""
    here = height_name(module)
    if here not in HEIGHTS:
        return [f"{module} has no line in LAYERS of tests/test_architecture.py: give it one."]
    problems = []
    for target in dict.fromkeys(imports_of(module, text)):
        there = height_name(target)
        if there == here and here in OPEN_FOLDERS:
            continue
        if target == "":
            problems.append(f"{module} imports the package itself: import from the module that has the name.")
        elif there not in HEIGHTS or HEIGHTS[there] >= HEIGHTS[here]:
            problems.append(f"{module} imports {target}, which does not stand below it.")
    return problems


def forbidden_uses(module: str, text: str) -> list[str]:
    """What a module does that only another one may do, or none."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        found = None
        if isinstance(node, ast.Call):
            callee = ast.unparse(node.func)
            if callee == "print" and height_name(module) != "cli/":
                found = "print: only the command line talks to the terminal"
            elif callee == "torch.load":
                found = "torch.load: it unpickles; use safetensors"
            elif callee == "isinstance" and module != "architectures":
                classes = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} - GENERAL_CLASSES
                found = next(
                    (f"isinstance of {name}" for name in sorted(classes) if CONCRETE_MODEL.search(name)), None
                )
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True":
            found = "trust_remote_code=True: it runs a stranger's code"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found = next(
                (f"import of {name}: it unpickles" for name in names if name.split(".")[0] in PICKLE_MODULES), None
            )
            if (
                any(re.match(r"transformers\.models\.(?!auto\b)", name) for name in names)
                and module != "architectures"
            ):
                found = f"import of {names[0]}: only architectures.py knows model types"
        if module != "architectures" and _mentions(node, "model_type"):
            found = "model_type: only architectures.py looks at it"
        if found:
            problems.append(f"{module}, line {getattr(node, 'lineno', '?')}: {found}.")
    return problems


def _mentions(node: ast.AST, word: str) -> bool:
    return (
        (isinstance(node, ast.Attribute) and node.attr == word)
        or (isinstance(node, ast.Name) and node.id == word)
        or (isinstance(node, ast.Constant) and node.value == word)
    )


@pytest.mark.parametrize("module", module_files())
def test_imports_point_downwards(module: str) -> None:
    assert wrong_arrows(module, module_files()[module]) == []


def test_no_circle_inside_a_folder() -> None:
    graph = {module: set(imports_of(module, text)) - {module} for module, text in module_files().items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"Modules import each other in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", module_files())
def test_only_the_right_file_does_it(module: str) -> None:
    assert forbidden_uses(module, module_files()[module]) == []


@pytest.mark.parametrize("module", module_files())
def test_no_file_is_too_long(module: str) -> None:
    num_lines = module_files()[module].count("\n")
    assert num_lines <= MAX_LINES, f"{module} has {num_lines} lines, expected at most {MAX_LINES}: split it by idea."


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("losses", "from mend_hf.errors import MendError\nimport mend_hf.trainer"),
        ("losses", "def f():\n    from mend_hf import model"),
        ("losses", "from . import architectures"),
        ("errors", "from mend_hf import MendModel"),
        ("prefix", "from mend_hf.data.collator import MendCollator"),
        ("data.collator", "from ..cli import main"),
        ("integrations.peft", "from mend_hf.integrations.vllm import x"),
        ("helpers", "import json"),
    ],
)
def test_the_arrow_checker_sees_a_wrong_arrow(module: str, text: str) -> None:
    assert len(wrong_arrows(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("trainer", "from mend_hf import __version__\nfrom mend_hf.data.collator import MendCollator"),
        ("data.metaicl", "from mend_hf.data.text import load_texts"),
        ("cli", "from mend_hf.trainer import MendTrainer\nimport torch"),
    ],
)
def test_the_arrow_checker_lets_a_right_arrow_pass(module: str, text: str) -> None:
    assert wrong_arrows(module, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "print('x')",
        "torch.load('x')",
        "import pickle",
        "from cloudpickle import dumps",
        "f(trust_remote_code=True)",
        "if config.model_type == 1: pass",
        "getattr(config, 'model_type')",
        "isinstance(model, (nn.Module, GPT2LMHeadModel))",
        "from transformers.models.llama import LlamaConfig",
    ],
)
def test_the_use_checker_sees_a_wrong_use(text: str) -> None:
    assert len(forbidden_uses("model", text)) == 1


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def test_importing_the_package_imports_no_heavy_library() -> None:
    lines = run_python("import mend_hf", "-X", "importtime").stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "mend_hf" in imported
    assert imported & {"matplotlib", "sklearn", "evaluate", "datasets"} == set()


# Imports the libraries underneath first, so that what changes afterwards is the package's own doing.
GLOBAL_STATE = """
import json, logging, os, random, sys, warnings
import numpy, torch, transformers, peft
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, pipeline

def describe_state():
    loggers = {name: logging.getLogger(name) for name in (None, "transformers", "torch", "peft", "datasets")}
    return {
        "loggers": {
            str(name): [logger.level, logger.propagate, logger.disabled, repr(logger.handlers)]
            for name, logger in loggers.items()
        },
        "environment": dict(os.environ),
        "warnings": repr(warnings.filters) + repr(warnings.showwarning),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch random": torch.get_rng_state().tolist(),
        "python random": repr(random.getstate()),
        "numpy random": repr(numpy.random.get_state()),
        "progress bars": transformers.utils.logging.is_progress_bar_enabled(),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook)],
    }

before, modules = describe_state(), set(sys.modules)
import mend_hf
for name in mend_hf.__all__:
    getattr(mend_hf, name)
after = describe_state()
heavy = {"matplotlib", "sklearn", "evaluate", "datasets"} & (set(sys.modules) - modules)
print(json.dumps({"changed": [key for key in before if before[key] != after[key]], "heavy": sorted(heavy)}))
"""


def test_the_package_is_found_from_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    """As the clone is for whoever starts Python next to it."""
    (tmp_path / "mend_hf").mkdir()
    code = "from importlib.util import find_spec; print(find_spec('mend_hf').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == Path(mend_hf.__file__)


def test_importing_every_public_name_changes_nothing_global() -> None:
    answer = json.loads(run_python(GLOBAL_STATE).stdout)
    assert answer == {"changed": [], "heavy": []}


def test_the_state_checker_sees_a_change() -> None:
    change = "torch.manual_seed(1); warnings.simplefilter('ignore'); os.environ['X'] = '1'"
    answer = json.loads(run_python(GLOBAL_STATE.replace("import mend_hf\n", f"import mend_hf\n{change}\n")).stdout)
    assert set(answer["changed"]) == {"torch random", "warnings", "environment"}
