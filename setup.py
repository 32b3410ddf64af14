"""Package metadata and dependencies, in the ranges that were tested."""

from setuptools import find_packages, setup

setup(
    name="megatron_rlhf",
    version="0.1.0",
    description="InstructGPT's recipe on Megatron-Core: SFT, K-wise reward models and PPO-ptx from two CPU cores to 175B",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_rlhf", "megatron_rlhf.*"]),
    package_data={"megatron_rlhf.monitoring": ["*.j2"]},
    python_requires=">=3.10",
    install_requires=[
        "megatron-core==0.16.1",  # parallel/cpu.py patches this version
        "torch>=2.9,<2.14",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "datasets>=3.0,<6",
        "transformers>=4.50,<6",
        "einops>=0.8",  # megatron-core's process grids
        "psutil>=6",  # megatron-core's dist_checkpointing
        "safetensors>=0.4.5",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=1.26",
    ],
    extras_require={
        "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],  # Apex comes with NVIDIA's PyTorch container
        "nemo": ["nemo-toolkit>=2.7"],  # reading an archive takes none of it: megatron_rlhf/conversion/nemo/archive.py
        "wandb": ["wandb>=0.18"],
        "dev": ["pytest>=8", "pytest-timeout>=2.3", "ruff>=0.8", "mypy>=1.13", "types-tqdm"],
    },
)
