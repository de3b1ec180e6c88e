"""Packaging. Tool settings are in pyproject.toml, the exact tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Read as text: importing the package here would need it to be importable before it is built.
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "minimagen_fast" / "__init__.py").read_text(), re.M).group(1)

# setuptools is what the packaging test builds with, without a network; a short benchmark run is one of the tests.
# With the optional packages, so that nothing is skipped for want of one.
TEST = [
    "datasets",
    "hypothesis",
    "matplotlib",
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist>=3.6",
    "setuptools>=77",
    "tensorboard",
    "wheel",
]

setup(
    name="minimagen_fast",
    version=VERSION,
    description="Performance edition of minimagen, the minimal Imagen text-to-image model: same API, same numbers.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The minimagen_fast authors",
    license="MIT",
    license_files=["LICENSE"],
    keywords="imagen text-to-image diffusion super-resolution triton pytorch",
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    # minimagen_fast/kernels is a symlink to ../kernels: the wheel and the sdist get real files under that name, and
    # none gets a top-level package `kernels`, which would shadow the one that transformers looks for.
    packages=["minimagen_fast", "minimagen_fast.kernels"],
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=4.46",
        "sentencepiece",
        "protobuf",
        "einops",
        "pillow",
        "tqdm",
        "numpy",
        "safetensors",
        "huggingface_hub",
    ],
    extras_require={
        "xformers": ["xformers>=0.0.35"],
        "data": ["datasets"],
        "tensorboard": ["tensorboard"],
        "report": ["matplotlib"],
        "test": TEST,
        "bench": ["pytest>=8", "pytest-benchmark", "matplotlib"],
        "dev": [*TEST, "ruff", "mypy"],
    },
    entry_points={"console_scripts": ["minimagen-fast = minimagen_fast.cli:main"]},
)
