#!/usr/bin/env python3
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The version stands in the package alone, and is read without importing it.
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "icefall_kd" / "__init__.py").read_text("utf8"),
    re.M,
)[1]

# What the digits recipe trains on; a group with its own icefall needs none of it.
digits = [
    "zipformer==0.1.3",
    "espeakng-loader>=0.2",
    "kaldialign>=0.7",
    "matplotlib>=3.6",
    "sentencepiece>=0.1.97",
    "soundfile>=0.12",
    "tensorboard>=2.8",
    "torchaudio",
]

# What makes the HTML pages of docs/.
docs = ["sphinx>=7", "sphinx-rtd-theme>=2", "myst-parser>=3"]

# What icefall-kd export writes and checks with.
export = [
    "onnx>=1.13",
    "onnxruntime>=1.14",
    "onnxconverter-common>=1.13",
    "sherpa-onnx>=1.10",
    "kaldialign>=0.7",
]

# What runs a Whisper as the teacher of `icefall-kd label`.
whisper = ["transformers>=4.46"]

setup(
    name="icefall_kd",
    version=VERSION,
    description="Knowledge distillation for icefall's Zipformer recipes",
    long_description=(ROOT / "README.md").read_text("utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["icefall_kd", "icefall_kd.*"]),
    package_data={"icefall_kd": ["py.typed"]},
    include_package_data=False,  # MANIFEST.in says what the sdist has, not the wheel
    install_requires=[
        "click>=8.0",
        "lhotse>=1.27",
        "numpy",
        "torch>=1.13",
        "tqdm",
        "pyyaml",
        "urllib3",  # lhotse imports it and does not declare it
    ],
    extras_require={
        "digits": digits + export,
        "docs": docs,
        "export": export,
        "mvq": ["multi_quantization"],
        "report": ["kaldialign>=0.7", "matplotlib>=3.6"],
        "test": digits
        + docs
        + export
        + whisper
        + [
            "matplotlib>=3.6",
            "multi_quantization",
            "pytest>=7",
            "pytest-xdist>=3.7",
            "hypothesis>=6",
            "black==25.1.0",
            "isort==5.13.2",
            "ruff==0.8.6",
            "setuptools>=61",
            "wheel",
        ],
        "whisper": whisper,
    },
    entry_points={"console_scripts": ["icefall-kd=icefall_kd.cli:main"]},
)
