"""The machines that a plan is made for, and how much text there is: what training configurations do not contain."""

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
    matmul_efficiency: float = 0.55
    """Share of the peak that a layer's forward and backward reach, not counting communication and the pipeline bubble."""
    memory_gb_per_s: float
    """Bandwidth of a GPU's memory."""
    memory_efficiency: float = 0.7
    """Share of that bandwidth that decoding and the optimizer reach."""
    node_gb_per_s: float
    """Bandwidth between the GPUs of a node, for each GPU and direction."""
    network_gb_per_s: float
    """Bandwidth between nodes, for each GPU and direction."""
    decode_layer_overhead_us: float = 250.0
    """Time of one layer for one decoded token: a dozen kernels launched one by one (there are no CUDA graphs) and two
    small all-reduces over tensor-parallel ranks. An estimate."""
    price_per_gpu_hour: float = 0.0
    """Price of one GPU hour in dollars; prices differ a lot, so set your own."""

    @property
    def gpus(self) -> int:
        """GPUs, and therefore ranks, of the whole job."""
        return (self.nodes or 1) * self.gpus_per_node

    def flops_per_s(self, precision: Precision) -> float:
        """Sustained FLOP/s of one GPU in large matrix products."""
        peaks = {Precision.fp32: self.fp32_tflops, Precision.fp8_hybrid: self.fp8_tflops or self.bf16_tflops}
        return 1e12 * self.matmul_efficiency * peaks.get(precision, self.bf16_tflops)


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


@dataclass(kw_only=True)
class PlanConfig:
    """`tools/plan.py`: the keys in addition to those of the planned stage."""

    cluster: ClusterConfig
    """Machines and rates."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    """How much text, how long."""
    recipe_nodes: dict[str, int] = field(default_factory=dict)
    """Stage -> nodes that a recipe's layout is made for: conf/recipe/NAME/plan.yaml."""

    def cluster_for(self, stage: str) -> ClusterConfig:
        """The cluster with the stage's number of nodes."""
        return replace(self.cluster, nodes=self.cluster.nodes or self.recipe_nodes.get(stage, 1))
