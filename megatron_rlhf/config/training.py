"""What every stage shares: the run folder, optimizer, roles and sampling."""

import re
from dataclasses import dataclass, field
from enum import Enum

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lora import LoraConfig
from megatron_rlhf.config.model import Fp8Recipe, Precision

NOT_GIVEN = "???"
"""OmegaConf's mark of a value that must be given. It fails at a key of two types in a group that is required as a whole, so
`run` is made with it."""
AUTO = "auto"
"""run.save_every: the planner's number."""


class ExportChoice(Enum):
    """Which checkpoint becomes a Hugging Face folder."""

    best = "best"
    last = "last"


@dataclass(kw_only=True)
class RunConfig:
    """Where a run writes its files, and how it continues after an interruption."""

    dir: str
    """Folder of this run: config.yaml, metrics.jsonl, samples.jsonl, TensorBoard events, checkpoints/, report.html, log.txt."""
    resume: bool = False
    """Continue from the newest complete checkpoint in `dir`, at this layout or another; docs/crashes.md says what may change."""
    auto_resume: bool = False
    """Resume if `dir` has a checkpoint, else start a new run: for jobs that are stopped and queued again."""
    seed: int = 1234
    """Seeds initial weights, dropout, data order and sampling."""
    save_every: int | str = 100
    """Steps between checkpoints; one is always written at the end. 0: only at the end; auto: as many as lose least time to
    saving and to failures, by the planner's seconds on `cluster`."""
    cluster: str | None = None
    """A file of conf/cluster/, for save_every=auto, and for the peak FLOP/s that throughput/mfu is a share of. When not
    given, the one whose name is in the GPU's; on a CPU there is no mfu then."""
    keep_last: int = 2
    """Checkpoints to keep, and the same number of SFT's epochs in addition to the best; older ones are deleted. 0 keeps all."""
    keep_every: int = 0
    """Of the older ones, still keep those of every n-th step (such as 1000); 0: none."""
    async_save: bool = False
    """Write checkpoints while the next steps run; needs host memory for a copy of each rank's part."""
    stop_at_step: int | None = None
    """Save and stop at this step although the schedule is longer (to continue later with resume)."""
    wandb_project: str | None = None
    """Also send config, metrics and samples to this Weights & Biases project; needs the wandb extra."""
    wandb_entity: str | None = None
    """Whose project it is; not given: the account's default."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run there."""
    mlflow_experiment: str | None = None
    """Also send config, metrics and samples to this experiment of MLflow, at MLFLOW_TRACKING_URI; needs the mlflow extra."""
    export_hf: ExportChoice | None = None
    """best or last: when the run is over, also write the trained model as a Hugging Face folder, `dir`/huggingface, checked as
    megatron-rlhf convert does. best needs what decides it: validation (SFT) or evaluation.every (PPO)."""
    max_skipped_steps: int = 5
    """Stop when this many updates in a row were skipped for a non-finite loss or gradient."""
    profile: str | None = None
    """Steps to trace with the torch profiler on the first rank of each node, first and last: "10:12"."""
    rendezvous_timeout_s: float = 300.0
    """The run ends if not all ranks have started and reached the first one after this long; after a minute it says which."""

    def profiled_steps(self) -> range:
        """The steps that `profile` names, counted from 1.

        Raises:
            UserError: it names none.
        """
        if self.profile is None:
            return range(0)
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.profile.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if first < 1 or last < first:
            raise UserError(
                f"run.profile={self.profile}: the first and the last step to trace, counted from 1, such as 10:12"
            )
        return range(first, last + 1)


@dataclass(kw_only=True)
class WatchdogConfig:
    """Ends a job in which a rank has died, hangs, or waits for something that the other ranks do not do."""

    timeout_s: float = 1800.0
    """The job ends within this many seconds, and says which rank was at fault; 0 switches it off. Must be longer than
    one rank may legitimately keep the others waiting, such as for a slow file system."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """Adam with decoupled weight decay; fp32 moments and master weights."""

    lr: float = 1e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment (InstructGPT, appendix C)."""
    epsilon: float = 1e-8
    """Added to the square root of the second moment; InstructGPT does not state its value."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices, none on biases and norms; InstructGPT does not state its value."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns this off. InstructGPT does not state its value."""


@dataclass(kw_only=True)
class RoleConfig:
    """A model that is only read: the reward model of PPO."""

    init_from: str | None = None
    """A checkpoint of this project (step folder or run folder) or a Hugging Face folder, of a model of the role's kind."""


@dataclass(kw_only=True)
class TrainedRoleConfig(RoleConfig):
    """A model that is trained."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its optimizer."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters, which train instead of the model's own weights."""
    trainable: list[str] = field(default_factory=list)
    """Train only some weights: layers (layers.4-7, layers.20-), names as in checkpoints or beginnings of them
    (decoder.final_layernorm), or patterns (*.mlp.*). Not given: all. A scalar head always trains. docs/lora.md."""


@dataclass(kw_only=True)
class SamplingConfig:
    """How responses are sampled from the policy."""

    temperature: float = 1.0
    """Logits are divided by this, when sampling and in every log-probability; 0 is greedy (evaluation only)."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this much probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the response holds already are divided by this where they are positive, multiplied
    where negative (Keskar et al. 2019); log-probabilities are those without it. For evaluation and chat."""
    beams: int = 1
    """Beam search with this many beams instead of sampling (as `transformers`' num_beams). For evaluation and chat."""
    max_response_tokens: int | None = None
    """Longest response. Not given: what the longest prompt leaves of the model's context, half of it where none is given
    either, and at most InstructGPT's 1k tokens (in chat: 256)."""
    min_response_tokens: int = 1
    """Stop tokens are not sampled before this many tokens."""
    batch_size: int = 64
    """Slots: sequences decoded together in each batch; each data-parallel rank has as many batches in flight as there
    are pipeline stages. The slot of a finished sequence is taken by the next prompt."""
    precision: Precision | None = None
    """Precision of sampling with precision=fp8_hybrid: bf16 (when not given) or fp8_hybrid; otherwise the model's own."""

    @property
    def longest_response(self) -> int:
        """`max_response_tokens`, once it is known (`lengths`)."""
        assert self.max_response_tokens is not None
        return self.max_response_tokens


@dataclass(kw_only=True)
class Fp8Config:
    """`precision=fp8_hybrid`: the layers of models that train compute in fp8; heads and frozen models never do."""

    recipe: Fp8Recipe = Fp8Recipe.tensorwise
    """tensorwise: a tensor's scale comes from its own largest number; delayed: from its past largest numbers (in PPO
    the value model then stays in bf16); blockwise: a scale for each block of 128 (CUDA 12.9, Hopper); mxfp8: for each
    block of 32 (Blackwell); nvfp4: 4 bits, for each block of 16 (Blackwell)."""
    gate_every: int = 50
    """Steps between comparisons of the policy's log-probabilities in fp8 with those in bf16; 0 for never."""
    gate_max_gap: float = 0.05
    """Largest mean difference of a token's log-probability, in nats; beyond it the policy switches to bf16 for the rest
    of the run."""
    gate_samples: int = 8
    """Texts that are compared, always the same: the first prompts of PPO, the first examples of fine-tuning."""


class Selection(Enum):
    """What decides which SFT checkpoint is best."""

    validation_loss = "validation_loss"
    reward_model = "reward_model"


class KLControl(Enum):
    """Whether the KL coefficient stays or follows a target."""

    fixed = "fixed"
    adaptive = "adaptive"


class AdvantageEstimator(Enum):
    """What a response is compared with: a value model's expectation, or the prompt's other samples."""

    gae = "gae"
    rloo = "rloo"
    grpo = "grpo"
    reinforce_baseline = "reinforce_baseline"


@dataclass(kw_only=True)
class OffloadConfig:
    """What is kept in host memory while it is not used: saves GPU memory at the cost of copies."""

    reference: bool = False
    """The reference's weights, except during the pass over a rollout."""
    reward: bool = False
    """The reward model's weights, except during the pass that scores a rollout."""
    optimizer: bool = False
    """Master weights and moments of policy and value model, except during their updates."""
