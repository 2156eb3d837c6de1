#!/usr/bin/env python3
from pathlib import Path

from setuptools import find_packages, setup

# What the digits recipe trains on; a group with its own icefall needs none of it.
digits = [
    "zipformer==0.1.3",
    "espeakng-loader>=0.2",
    "kaldialign>=0.7",
    "sentencepiece>=0.1.97",
    "soundfile>=0.12",
    "tensorboard>=2.8",
    "torchaudio",
]

# What icefall-kd export writes and checks with.
export = [
    "onnx>=1.13",
    "onnxruntime>=1.14",
    "onnxconverter-common>=1.13",
    "sherpa-onnx>=1.10",
    "kaldialign>=0.7",
]

setup(
    name="icefall_kd",
    version="0.1.0",
    description="Knowledge distillation for icefall's Zipformer recipes",
    long_description=Path(__file__).with_name("README.md").read_text("utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["icefall_kd", "icefall_kd.*"]),
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
        "export": export,
        "mvq": ["multi_quantization"],
        "report": ["kaldialign>=0.7", "matplotlib>=3.6"],
        "test": digits
        + export
        + [
            "matplotlib>=3.6",
            "multi_quantization",
            "pytest>=7",
            "pytest-xdist>=3.7",
            "hypothesis>=6",
            "black==25.1.0",
            "isort==5.13.2",
        ]
        + ["ruff==0.8.6"],
    },
    entry_points={"console_scripts": ["icefall-kd=icefall_kd.cli:main"]},
)
