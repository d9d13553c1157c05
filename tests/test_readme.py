"""What the README and the documentation show is run: Python blocks and commands, from a page's top to its bottom."""

from __future__ import annotations

import copy
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import run_mend
from peft_checks import PAIR_IS_RIGHT
from tiny import load_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from weights import NAME

from mend_hf import MendConfig, get_mend_model
from mend_hf.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
DISTILLER = Path("examples/distillers/smollm2-135m-kv")
# Added to what a page shows: the same training, only short.
FEW_ROWS = ["--num-rows", "2", "--batch-size", "2"]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def find_blocks(page: Path, languages: str) -> list[tuple[str, str]]:
    """The fenced code blocks of a page in these languages ("python|bash"), each behind its language."""
    return re.findall(rf"^```({languages})\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def read_blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return [block for _, block in find_blocks(page, language)]


def read_commands(page: Path) -> list[list[str]]:
    """The command lines of a page as words, without their comments."""
    return [words for block in read_blocks(page, "bash") for words in split_commands(block)]


def split_commands(block: str) -> list[list[str]]:
    """The command lines of a block as words, without their comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def show(page: Path) -> str:
    return str(page.relative_to(ROOT))


def have_pages(language: str, start: str = "") -> list[Path]:
    return [
        page for page in PAGES if any(re.search(f"^{start}", b, re.MULTILINE) for b in read_blocks(page, language))
    ]


def run_blocks(page: Path, languages: str = "python|bash") -> None:
    """Run a page's blocks in order: Python in one namespace, of the commands `mend`."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, (language, block) in enumerate(find_blocks(page, languages), start=1):
        if language == "python":
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
            continue
        for program, *words in split_commands(block):
            if program == "mend":
                extra = FEW_ROWS if words[0] in ("pretrain", "finetune") else []
                assert run_mend([*words, *extra]) == 0, shlex.join(words)


def substitute(monkeypatch: pytest.MonkeyPatch, loaded: Loaded) -> None:
    """Answer the question for SmolLM2's Hub name with this model and tokenizer."""
    auto_classes, things = (AutoModelForCausalLM, AutoTokenizer, AutoConfig), (*loaded, loaded[0].config)
    for auto_class, thing in zip(auto_classes, things, strict=True):
        original: Callable[..., Any] = auto_class.from_pretrained

        def from_pretrained(
            name: Any, *args: Any, _thing: Any = thing, _original: Any = original, **kwargs: Any
        ) -> Any:
            return copy.deepcopy(_thing) if name == NAME else _original(name, *args, **kwargs)

        monkeypatch.setattr(auto_class, "from_pretrained", from_pretrained)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the examples in it, where tiny models stand for SmolLM2 and for its distiller."""
    base, tokenizer = load_tiny()
    base.name_or_path = base.config.name_or_path = tokenizer.name_or_path = NAME
    (tmp_path / DISTILLER).mkdir(parents=True)
    get_mend_model(copy.deepcopy(base), MendConfig(num_virtual_tokens=4), tokenizer).save_pretrained(
        tmp_path / DISTILLER
    )
    for path in (ROOT / "examples").iterdir():
        if path.name != "distillers":
            (tmp_path / "examples" / path.name).symlink_to(path)
    substitute(monkeypatch, (base, tokenizer))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted({*have_pages("python"), *have_pages("bash", "mend ")}), ids=show)
def test_blocks_run(page: Path, clone: Path, request: pytest.FixtureRequest) -> None:
    if page.name == "hub.md":
        request.getfixturevalue("hub")
    if page.name == "export.md" and not PAIR_IS_RIGHT:
        pytest.skip("this PEFT does not know this transformers' cache")
    run_blocks(page)


@pytest.mark.real
def test_python_blocks_of_the_readme_run_with_smollm2(
    smollm2: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / DISTILLER / "mend_config.json").is_file():
        pytest.fail(f"Expected the shipped distiller in {DISTILLER}, found none: train it and save it there.")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    substitute(monkeypatch, smollm2)
    monkeypatch.chdir(tmp_path)
    run_blocks(README, "python")


@pytest.mark.parametrize("page", have_pages("bash"), ids=show)
def test_commands_exist_and_know_their_options(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = typer.main.get_command(app).commands
    for program, *words in read_commands(page):
        if program == "mend":
            assert words[0] in commands, f"mend {words[0]}"
            commands[words[0]].make_context(words[0], words[1:])
        elif program == "make":
            assert words[0] in targets
        else:
            assert program == "python"
            assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("name", ["quickstart.py", "train_two_stages.py"])
def test_example_runs_with_tiny_weights(name: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) < 80
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--output-dir", str(clone / "out")])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert any((clone / "out").iterdir())
