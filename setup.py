"""Package metadata and dependencies, in the ranges that were tested."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithSettings(build_py):
    """conf/ is at the top of the repository; a wheel has it inside the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "conf", Path(self.build_lib) / "megatron_rlhf" / "conf", dirs_exist_ok=True)


setup(
    name="megatron_rlhf",
    version=re.search(r'__version__ = "(.+)"', (HERE / "megatron_rlhf" / "__init__.py").read_text())[1],
    cmdclass={"build_py": BuildWithSettings},
    entry_points={"console_scripts": ["megatron-rlhf = megatron_rlhf.__main__:main"]},
    description="InstructGPT's recipe on Megatron-Core: SFT, K-wise reward models and PPO-ptx from two CPU cores to 175B",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_rlhf", "megatron_rlhf.*"]),
    package_data={
        "megatron_rlhf.data.formats": ["known/*.yaml"],
        "megatron_rlhf.monitoring": ["*.j2"],
        "megatron_rlhf.labeling": ["templates/*.j2", "static/*"],
        "megatron_rlhf.evaluation.benchmarks": ["tasks/*.yaml", "tasks/*/*.yaml"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        # What differs between the two is in parallel/compat.py; newer wheels than 0.16.1 need Python 3.12.
        'megatron-core>=0.19.2,<0.20; python_version >= "3.12"',
        'megatron-core==0.16.1; python_version < "3.12"',
        "torch>=2.9,<2.15",
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
        "scipy>=1.11",
        # The labeling page.
        "datasketch>=1.6",
        "phonenumbers>=8.13",
        "python-stdnum>=1.20",
        "starlette>=0.40",
        "uvicorn>=0.30",
        "python-multipart>=0.0.18",  # starlette's forms
        "itsdangerous>=2.1",  # starlette's cookies
    ],
    extras_require={
        # Compiled against the torch that is installed: docs/cluster.md. Apex comes with NVIDIA's PyTorch container.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.21"],
        # For tools of NeMo's own beside ours. Reading its archives takes none of it (conversion/nemo/archive.py), and since
        # 3.0 it has no collection of language models any more.
        "nemo": ["nemo-toolkit>=2.7"],
        "benchmarks": ["lm_eval>=0.4.9,<0.5", "sacrebleu>=2.4", "rouge_score>=0.1.2"],
        "wandb": ["wandb>=0.18"],
        "mlflow": ["mlflow-skinny>=2.15"],
        "dev": [
            *("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.8", "mypy>=1.13", "types-tqdm"),
            *("peft>=0.15", "playwright>=1.50"),
        ],
    },
)
