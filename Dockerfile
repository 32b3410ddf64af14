# megatron_rlhf for clusters, on NVIDIA's PyTorch image: Transformer Engine, Apex, flash-attn, NCCL and CUDA come with it.
#
#   docker build -t megatron_rlhf .
#   enroot import -o megatron_rlhf.sqsh dockerd://megatron_rlhf
#   CONTAINER_IMAGE=$PWD/megatron_rlhf.sqsh sbatch slurm/ppo_175b.sh ...
#
# The image has Python 3.12, which gets Megatron-Core 0.19.2; another month: --build-arg NVIDIA_PYTORCH=...
ARG NVIDIA_PYTORCH=25.11
FROM nvcr.io/nvidia/pytorch:${NVIDIA_PYTORCH}-py3

WORKDIR /opt/megatron_rlhf
COPY setup.py pyproject.toml README.md LICENSE ./
COPY megatron_rlhf megatron_rlhf
COPY conf conf
COPY examples examples
COPY tools tools
COPY slurm slurm
# The image pins its own torch build in PIP_CONSTRAINT, so no other is installed over it.
RUN pip install --no-cache-dir --editable .

# Fails the build, not the job, if an accelerator is missing or Megatron-Core cannot be imported beside it.
RUN python -c "import apex, transformer_engine.pytorch, megatron.core; from importlib.metadata import version; \
    print(*(f'{name} {version(name)}' for name in ('torch', 'megatron-core', 'transformer-engine')))"
