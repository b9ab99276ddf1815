"""What a hybrid model costs: parameters, and FLOPs to train on a token (for the MFU)."""

CG_STEPS = 8  # counted for each solve of local linear attention: about what normalised q and k need at ridge 1


def num_parameters(model, active=False):
    """Returns how many numbers of a `nano_hybrid.Hybrid` are trained; a tied matrix counts once.

    active: those that one token uses. Without the multi-token predictor, as in the published figures.
    """
    config, named = model.config, model.named_parameters()
    return sum(_size(p, name, config, active) for name, p in named if not name.startswith("mtp."))


def _size(p, name, config, active):
    """Returns how many numbers a parameter has; of stacked experts, if `active`, those that one token uses."""
    share = active and ".experts." in name
    return p.numel() * config.num_experts_per_tok // config.n_routed_experts if share else p.numel()


def flops_per_token(model, context):
    """Returns the floating-point operations to train on one token: 6 per matrix weight, plus what mixes tokens.

    Forward counts 2 per weight, backward twice that. Attention: scores and values over half the context (causal).
    SSD: the chunked algorithm, causal half of a chunk, with C.B once per group. Multi-token prediction: block and
    projection for each depth. Local linear attention: where attention has 2 products of queries with keys or values
    forward and 4 backward, it has 4 and 8, and 2 for each step of each of its two solves by conjugate gradients
    (lla.py). As everywhere, what a kernel computes again does not count.
    """
    c, pattern = model.config, model.config.hybrid_override_pattern
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2 and "embed" not in n and "conv1d" not in n]
    main = sum(_size(p, n, c, True) for n, p in matrices if not n.startswith("mtp."))
    mtp = sum(_size(p, n, c, True) for n, p in matrices if n.startswith("mtp."))
    if c.tie_word_embeddings:
        main += c.vocab_size * c.hidden_size
    attention = 2 * context / 2 * c.num_attention_heads * c.head_dim
    Q = min(c.chunk_size, context)
    scan = Q / 2 * (c.ssm_state_size * c.n_groups + c.mamba_size) + 2 * c.mamba_size * c.ssm_state_size
    local_linear = (4 + 8 + 2 * 2 * CG_STEPS) / (2 + 4) * attention
    main += pattern.count("*") * attention + pattern.count("L") * local_linear + pattern.count("M") * scan
    if c.num_nextn_predict_layers:
        depth = mtp + c.mtp_hybrid_override_pattern.count("*") * attention + c.vocab_size * c.hidden_size
        main += c.mtp_depths * depth
    return 6 * main
