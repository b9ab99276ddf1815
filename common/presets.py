"""Shapes of models, by name: those we train and those of the papers. Keywords of `nano_hybrid.HybridConfig`."""

# fmt: off
SMALL = dict(
    vocab_size=50304, hidden_size=768, tie_word_embeddings=True, num_attention_heads=12, num_key_value_heads=12,
    head_dim=64, intermediate_size=3072, mamba_num_heads=24, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    chunk_size=128, initializer_range=0.02,
)
_NANO3_TINY = dict(
    hybrid_override_pattern="MEM*EME", num_experts_per_tok=4, n_routed_experts=16, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=256, routed_scaling_factor=2.5,
)
_NANO3_SMALL = dict(  # 4 x 512 + 1,024 hidden units for a token: as many as the MLP of `small` has
    hybrid_override_pattern="MEMEM*EMEMEM*EMEME", num_experts_per_tok=4, n_routed_experts=32, moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=1024, routed_scaling_factor=2.5,
)
_RELEASED = dict(  # what NVIDIA's released Nano 2 models have in common
    vocab_size=131072, num_attention_heads=40, num_key_value_heads=8, head_dim=128, mamba_num_heads=128,
    mamba_head_dim=80, ssm_state_size=128, n_groups=8, chunk_size=128,
)
_NEMOTRON_3 = dict(
    vocab_size=131072, num_key_value_heads=2, head_dim=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    chunk_size=128,
)
SHAPES = {  # the shapes we train (tiny, small) and the papers' models
    # 1.8M parameters with the shipped vocabulary: minutes on a laptop's CPU.
    "tiny": dict(),  # the defaults of HybridConfig
    # 122M with GPT-2's vocabulary, to stand beside GPT-2's 124M; 87M with the shipped one.
    "small": dict(**SMALL, hybrid_override_pattern="M-M-M*-M-M-M*-M-M-"),
    # The same with a mixture of experts for each MLP, of as many active parameters: Nemotron 3 Nano, arXiv:2512.20848.
    "nano3-tiny": dict(**_NANO3_TINY),
    "nano3": dict(**SMALL, **_NANO3_SMALL),
    # And with LatentMoE, alpha 4 (`latent_moe.latent_twin` of those), and multi-token prediction: Nemotron 3 Super.
    "super3-tiny": dict(
        **_NANO3_TINY
        | dict(moe_latent_size=32, n_routed_experts=64, num_experts_per_tok=12, routed_scaling_factor=5.0),
        num_nextn_predict_layers=1,
    ),
    "super3": dict(
        **SMALL, num_nextn_predict_layers=1,
        **_NANO3_SMALL
        | dict(moe_latent_size=192, n_routed_experts=128, num_experts_per_tok=14, routed_scaling_factor=5.0),
    ),
    # `small` and `tiny` with local linear attention in place of softmax attention, arXiv:2510.01450. The tiny one has
    # heads of 32: on a CPU a D x D system is solved for each position and head.
    "lla-tiny": dict(hybrid_override_pattern="M-ML-M-", head_dim=32),
    "lla": dict(**SMALL, hybrid_override_pattern="M-M-ML-M-M-ML-M-M-"),
    # Nemotron Nano 2, arXiv:2508.14444: 12.31 B, and the 8.89 B pruned from it.
    "nano-12b-v2": dict(
        **_RELEASED, hidden_size=5120, intermediate_size=20480, initializer_range=0.0125,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    ),
    "nano-9b-v2": dict(
        **_RELEASED, hidden_size=4480, intermediate_size=15680, initializer_range=0.0134,
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    ),
    # Nemotron 3 (arXiv:2512.20848, 2604.12374, 2606.15007): 31.58 B, 3.58 B active; 120.67 B, 12.77 B; 549.3 B, 56.1 B.
    "nano-3-30b-a3b": dict(
        **_NEMOTRON_3, hidden_size=2688, num_attention_heads=32, mamba_num_heads=64, n_routed_experts=128,
        num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5, initializer_range=0.0173,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "super-3-120b-a12b": dict(
        **_NEMOTRON_3, hidden_size=4096, num_attention_heads=32, mamba_num_heads=128, n_routed_experts=512,
        num_experts_per_tok=22, moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024, num_nextn_predict_layers=1, routed_scaling_factor=5.0, initializer_range=0.014,
        hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "ultra-3-550b-a55b": dict(
        **_NEMOTRON_3, hidden_size=8192, num_attention_heads=64, mamba_num_heads=256, n_routed_experts=512,
        num_experts_per_tok=22, moe_intermediate_size=5120, moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048, num_nextn_predict_layers=1, routed_scaling_factor=5.0, initializer_range=0.0099,
        hybrid_override_pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
}
# fmt: on
