"""The rows of docs/planner.md: what was published, and what its source says of model, layout and program.

Sources: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", tables 3 and 5.
Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", table 1, with the micro batches of
Megatron-LM's examples/sc21/run_table_1.sh. NeMo 24.07 and Megatron-Bridge 25.11, performance summaries; gradients are
reduced in bf16, weights gathered in fp8. Megatron-LM's README (2024): it states GPUs, batch and MFU, not the layout, which is
assumed: the smallest number of GPUs, 96, as tensor 8 x pipeline 12.
"""

from functools import partial

from megatron_rlhf.config.model import Activation, ModelConfig, Norm, ParallelConfig, Positions, Precision, Recompute
from megatron_rlhf.planning.published.run import PublishedRun, Unit
from megatron_rlhf.planning.speed.execution import Execution

_gpt = partial(ModelConfig, vocab_size=51200)
_llama = partial(
    ModelConfig,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    linear_bias=False,
    tied_embeddings=False,
)
_GPT_1_7B = _gpt(num_layers=24, hidden_size=2304, num_attention_heads=24)
_GPT_20B = _gpt(num_layers=44, hidden_size=6144, num_attention_heads=48)
_GPT_22B = _gpt(num_layers=48, hidden_size=6144, num_attention_heads=64)
_GPT_145B = _gpt(num_layers=80, hidden_size=12288, num_attention_heads=96)
_GPT_175B = _gpt(num_layers=96, hidden_size=12288, num_attention_heads=96)
_GPT_530B = _gpt(num_layers=105, hidden_size=20480, num_attention_heads=128)
_GPT_1T = _gpt(num_layers=128, hidden_size=25600, num_attention_heads=160)
_README_175B = ModelConfig(num_layers=96, hidden_size=12288, num_attention_heads=96, vocab_size=131072)
_LLAMA2_7B = _llama(num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000)
_llama_70b = partial(
    _llama, num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672
)
_LLAMA3_8B = _llama(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
)


def _layout(tensor: int, pipeline: int, virtual: int = 1, recompute: Recompute = Recompute.none) -> ParallelConfig:
    """With sequence parallelism and a distributed optimizer."""
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_stages=virtual,
        sequence=tensor > 1,
        distributed_optimizer=True,
        recompute=recompute,
    )


def _plain(tensor: int, pipeline: int, virtual: int = 1) -> ParallelConfig:
    """Without either, every layer recomputed."""
    return ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_stages=virtual, recompute=Recompute.full)


_a100 = partial(
    PublishedRun,
    cluster="a100_80gb",
    length=2048,
    execution=Execution(fused_attention=False, scatters_messages=True),
)
_korthikanti = partial(_a100, source="Korthikanti 2022", unit=Unit.seconds)
_narayanan = partial(_a100, source="Narayanan 2021", unit=Unit.tflops_recomputed)
_hides_data = partial(Execution, hides_gradients=True, hides_weights=True)
_NEMO = _hides_data(hides_tensor=True, hides_pipeline=True, gradient_bytes=2, weight_bytes=1)
_fp8 = partial(PublishedRun, cluster="h100_80gb", precision=Precision.fp8_hybrid)
_nemo = partial(_fp8, source="NeMo 24.07", unit=Unit.tflops, execution=_NEMO)
_bridge = partial(_fp8, source="Megatron-Bridge 25.11", unit=Unit.causal_tflops, length=8192, batch_size=128)
_readme = partial(
    PublishedRun,
    source="Megatron-LM README",
    cluster="h100_80gb",
    model=_README_175B,
    parallel=_layout(8, 12, 8),
    batch_size=1152,
    micro_batch_size=1,
    length=4096,
    unit=Unit.mfu,
    execution=_hides_data(hides_tensor=True, hides_pipeline=True),
)
_selective = partial(_layout, recompute=Recompute.selective)

# fmt: off
RUNS = [
    _korthikanti("GPT 22B", gpus=8, model=_GPT_22B, parallel=_selective(8, 1), batch_size=4, micro_batch_size=4, value=1.10),
    _korthikanti("GPT 175B", gpus=64, model=_GPT_175B, parallel=_selective(8, 8, 3), batch_size=64, micro_batch_size=1,
                 value=13.75),
    _korthikanti("GPT 175B, recomputed", gpus=64, model=_GPT_175B, parallel=_plain(8, 8, 3), batch_size=64,
                 micro_batch_size=1, value=18.13),
    _korthikanti("GPT 530B", gpus=280, model=_GPT_530B, parallel=_selective(8, 35, 3), batch_size=280, micro_batch_size=1,
                 value=37.83),
    _korthikanti("GPT 1T", gpus=512, model=_GPT_1T, parallel=_selective(8, 64), batch_size=512, micro_batch_size=1,
                 value=71.5),
    _narayanan("GPT 1.7B", gpus=32, model=_GPT_1_7B, parallel=_plain(1, 1), batch_size=512, micro_batch_size=16, value=137),
    _narayanan("GPT 145B", gpus=1536, model=_GPT_145B, parallel=_plain(8, 8, 2), batch_size=2304, micro_batch_size=2,
               value=148),
    _nemo("GPT-3 175B", gpus=128, model=_GPT_175B, parallel=_layout(4, 8, 6), batch_size=256, micro_batch_size=1,
          length=2048, value=782),
    _nemo("GPT-3 175B", gpus=512, model=_GPT_175B, parallel=_layout(4, 8, 6), batch_size=2048, micro_batch_size=2,
          length=2048, value=842),
    _nemo("Llama 2 70B", gpus=64, model=_llama_70b(vocab_size=32000), parallel=_layout(4, 4, 20), batch_size=128,
          micro_batch_size=1, length=4096, value=759),
    _nemo("Llama 2 7B", gpus=8, model=_LLAMA2_7B, parallel=_layout(1, 1), batch_size=128, micro_batch_size=1,
          length=4096, value=776),
    _nemo("GPT-3 20B", gpus=64, model=_GPT_20B, parallel=_layout(2, 1), batch_size=256, micro_batch_size=2,
          length=2048, value=750),
    _bridge("Llama 3 8B", gpus=8, model=_LLAMA3_8B, parallel=_layout(1, 1, recompute=Recompute.full), micro_batch_size=1,
            value=744, execution=_hides_data(gradient_bytes=2, weight_bytes=1, recomputed_share=5 / 32)),
    _bridge("Llama 3 70B", gpus=64, model=_llama_70b(vocab_size=128256), parallel=_layout(4, 8, 5), micro_batch_size=1,
            value=719, execution=_NEMO),
    _readme("GPT-3 175B", gpus=96, value=47),
    _readme("GPT-3 175B", gpus=4608, value=42),
]
# fmt: on
