"""The machines that a plan is made for, and how much text there is: what training configurations do not contain."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from megatron_rlhf.config.model import Precision


@dataclass(kw_only=True)
class ClusterConfig:
    """Nodes of equal GPUs, and the rates that the planner assumes."""

    name: str
    """What the GPUs are, for the report."""
    nodes: int | None = None
    """Nodes of the job; when not given, those that the recipe's layout is made for, else 1."""
    gpus_per_node: int = 8
    """GPUs (on a CPU cluster: ranks) per node, one rank each."""
    memory_gib: float
    """Memory of one GPU as the driver reports it, in GiB."""
    reserved_gib: float = 6.0
    """What training tensors cannot use: CUDA context, NCCL's buffers, workspaces, fragmentation."""
    bf16_tflops: float
    """Peak dense bf16 or fp16 TFLOP/s of a GPU."""
    fp32_tflops: float
    """Peak fp32 TFLOP/s of a GPU."""
    fp8_tflops: float | None = None
    """Peak dense fp8 TFLOP/s; null if the GPU has no fp8."""
    matmul_efficiency: float = 0.68
    """Share of the peak that large matrix products reach at the clock rate that the power limit allows."""
    attention_efficiency: float = 0.5
    """Share of the peak (bf16 under fp8) that fused attention reaches."""
    memory_gb_per_s: float
    """Bandwidth of a GPU's memory."""
    memory_efficiency: float = 0.8
    """Share of that bandwidth that kernels reach which do little else, the optimizer, and decoding."""
    node_gb_per_s: float
    """Bandwidth between the GPUs of a node, for each GPU and direction."""
    network_gb_per_s: float
    """Bandwidth between nodes, for each GPU and direction."""
    link_efficiency: float = 0.8
    """Share of the two bandwidths that collectives reach."""
    node_latency_us: float = 3.0
    """Time of one hop between GPUs of a node; a collective of n ranks has log2(n) of them, a sum twice as many."""
    network_latency_us: float = 8.0
    """The same between nodes."""
    layer_launch_us: float = 200.0
    """Time to launch the kernels of one layer's forward pass one by one, some thirty of them: a layer cannot take less,
    however few tokens there are, and its backward pass no less than twice this."""
    host_memory_gib: float = 2000.0
    """Memory of a node."""
    process_gib: float = 6.0
    """Memory of a node that one rank's process takes: Python, torch, CUDA's libraries, data."""
    host_gb_per_s: float = 20.0
    """From a GPU's memory to its host's."""
    storage_gb_per_s: float = 5.0
    """From one node to the file system that all share."""
    gpu_hours_per_failure: float = 50_000.0
    """GPU hours between failures that end a job: 419 in 54 days of 16,384 H100s (Grattafiori et al. 2024, section 3.3.4)."""
    price_per_gpu_hour: float = 0.0
    """Price of one GPU hour in dollars; prices differ a lot, so set your own."""

    @property
    def gpus(self) -> int:
        """GPUs, and therefore ranks, of the whole job."""
        return (self.nodes or 1) * self.gpus_per_node

    @property
    def memory_rate(self) -> float:
        """Bytes a second from or to a GPU's memory."""
        return 1e9 * self.memory_efficiency * self.memory_gb_per_s

    @property
    def host_rate(self) -> float:
        """Bytes a second from a GPU's memory to its host's, or back."""
        return 1e9 * self.host_gb_per_s

    @property
    def layer_launch_s(self) -> float:
        return 1e-6 * self.layer_launch_us

    def peak_flops_per_s(self, precision: Precision) -> float:
        """FLOP/s of one GPU by its data sheet."""
        peaks = {Precision.fp32: self.fp32_tflops, Precision.fp8_hybrid: self.fp8_tflops or self.bf16_tflops}
        return 1e12 * peaks.get(precision, self.bf16_tflops)

    def flops_per_s(self, precision: Precision) -> float:
        """Sustained FLOP/s of one GPU in large matrix products."""
        return self.matmul_efficiency * self.peak_flops_per_s(precision)


@dataclass(kw_only=True)
class WorkloadConfig:
    """How many examples and how long. Counts are InstructGPT's; the mean lengths are this project's assumptions."""

    demonstrations: int = 13_000
    """Prompts with a demonstration (SFT)."""
    rankings: int = 33_000
    """Prompts with ranked completions (reward model)."""
    completions: float = 6.5
    """Mean number of completions ranked per prompt; the paper has 4 to 9."""
    max_completions: int = 9
    """Largest number of completions of one prompt: they share a microbatch, so they decide its memory."""
    prompt_tokens: int = 400
    """Mean length of a prompt."""
    response_tokens: int = 300
    """Mean length of a response. Memory is always planned for the longest that the configuration allows."""

    @property
    def response_share(self) -> float:
        """Share of the tokens that are a response's: only these have logits."""
        return self.response_tokens / (self.prompt_tokens + self.response_tokens)


@dataclass(kw_only=True)
class PlanConfig:
    """`megatron-rlhf plan`: the keys in addition to those of the planned stage."""

    cluster: ClusterConfig
    """Machines and rates."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """How much text, how long."""
    recipe_nodes: dict[str, int] = field(default_factory=dict)
    """Stage -> nodes that a recipe's layout is made for: conf/recipe/NAME/plan.yaml."""

    def cluster_for(self, stage: str) -> ClusterConfig:
        """The cluster with the stage's number of nodes."""
        return replace(self.cluster, nodes=self.cluster.nodes or self.recipe_nodes.get(stage, 1))


WITHOUT_GPU = "laptop"
"""The file of conf/cluster/ for ranks on CPUs."""


def file_of_gpu(names: Iterable[str], gpu: str | None) -> str | None:
    """Of these files of conf/cluster/, the one whose name begins with a word of the GPU's; None as a GPU is none."""
    if gpu is None:
        return WITHOUT_GPU
    words = gpu.upper().replace("-", " ").split()
    return next((name for name in sorted(names) if name.split("_")[0].upper() in words), None)
