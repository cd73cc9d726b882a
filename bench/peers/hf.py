"""Loading for the peers that run in `transformers`."""

from __future__ import annotations

from typing import Any

from bench.peers.base import Pool


def load_models(pool: Pool) -> list[Any]:
    """Causal LMs in eval mode that never stop by themselves."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(pool.threads)
    dtype = getattr(torch, pool.dtype)
    if pool.random:
        from bench.e2e.random_pair import hf_model

        models = [hf_model(spec, dtype, pool.device) for spec in pool.random]
    else:
        loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(p, dtype=dtype) for p in pool.models]
        models = [m.to(pool.device) for m in loaded]
    for m in models:
        m.eval().requires_grad_(False)
        m.generation_config.eos_token_id = None
        m.generation_config.pad_token_id = 0
    return models


def about() -> dict[str, str]:
    import torch
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}
