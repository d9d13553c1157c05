"""Installs mend_hf; the settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` without importing the package, which would need torch."""
    text = (ROOT / "mend_hf" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('Expected a line __version__ = "..." in mend_hf/__init__.py, found none: write one.')
    return match.group(1)


def read_long_description() -> str:
    """Return the README, or nothing where a build leaves it out."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


EXTRAS = {
    "data": ["datasets", "pyarrow", "zstandard"],
    "gguf": ["gguf"],
    "docs": ["sphinx", "myst-parser", "furo"],
    "lm_eval": ["lm-eval"],
    "quantized": ["optimum-quanto"],
    "serve": ["fastapi", "uvicorn"],
    "space": ["gguf", "gradio>=6.31", "matplotlib"],
    "train": ["matplotlib"],
}
EXTRAS["eval"] = ["evaluate", "matplotlib", "pandas", "scikit-learn", *EXTRAS["data"]]
EXTRAS["demo"] = [*EXTRAS["gguf"], "zstandard"]
TOOLS = {
    "httpx", "hypothesis", "ipykernel", "mypy", "nbclient", "nbformat", "playwright", "pre-commit", "pytest",
    "pytest-xdist", "ruff",
}  # fmt: skip
# The fuzzer has wheels for few systems; its test is skipped where it is missing.
TOOLS.add('atheris; sys_platform == "linux" and platform_machine == "x86_64" and python_version == "3.11"')
EXTRAS["dev"] = sorted(TOOLS.union(*EXTRAS.values()))

setup(
    name="mend_hf",
    version=read_version(),
    description="Few-shot prompting without paying for the shots: demonstrations distilled for a frozen model",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mend_hf", "mend_hf.*"]),
    package_data={
        "mend_hf": [
            "py.typed",
            "demonstrations_card.md",
            "model_card.md",
            "data/partitions/*.json",
            "evaluation/report.html",
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.12",
        "datasets>=4.4",
        "evaluate",
        "huggingface-hub>=1.20",
        "jinja2",
        "packaging",
        "peft>=0.21,<1",
        "rich",
        "safetensors>=0.8",
        "torch>=2.6",
        "transformers>=5.17,<6",
        "typer",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mend = mend_hf.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
