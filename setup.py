"""Dependencies of TopoGPT: pip install -e ".[all]" -c constraints.txt (its versions are the tested ones).

The scripts run from the checkout; what they share is the package topogpt, importable from anywhere.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = Path(__file__).parent / "topogpt" / "__init__.py"
VERSION = re.search('__version__ = "(.+)"', PACKAGE.read_text(encoding="utf-8"))[1]

EXTRAS = {
    "data": ["datasets>=4,<6"],  # prepare_fineweb.py --dataset
    "wandb": ["wandb<1"],  # train.py --wandb
    "hf": ["transformers>=4.51,<6", "peft<1"],  # checking exported models; fine-tuning them
    "figures": ["matplotlib>=3.8,<4"],  # pictures of the sheets
    # the analyses, python -m evals.NAME
    "evals": ["scipy<2", "scikit-learn<2", "lm-eval<1", "xarray", "matplotlib>=3.8,<4"],
}
CHECKS = ["ruff<1", "mypy<3", "pytest<10", "pytest-xdist<4", "hypothesis<7"]
NOTEBOOKS = ["nbclient<1", "ipykernel<8"]  # running docs/notebooks
DEV = [*CHECKS, *NOTEBOOKS, "setuptools>=77", "scipy<2", *EXTRAS["hf"], *EXTRAS["figures"]]

setup(
    name="topogpt",
    version=VERSION,
    description="Pretrain GPTs whose units lie on a 2-D sheet",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["topogpt*"]),
    package_data={"": ["py.typed", "*.pyi", "*.jinja"]},
    install_requires=[
        "torch>=2.11,<3",
        "numpy<3",
        "tiktoken>=0.13,<1",  # from 0.13 on, long runs of one character are not quadratic
        "huggingface_hub<3",
        "safetensors<1",
        "pyarrow<30",
        "tyro<2",
        "PyYAML<7",
        "tqdm<5",
        "jinja2>=3.1,<4",  # model cards and reports
    ],
    extras_require={**EXTRAS, "dev": DEV, "all": sorted({p for ps in (*EXTRAS.values(), DEV) for p in ps})},
)
