"""Settings of the sections `rubric` and `trl` as TRL's SFTConfig and GRPOConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from roro_fast.config import RubricConfig
from roro_fast.config_trl import TrlConfig
from roro_fast.train.trl.actor import liger_of


def micro_batch(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most`: rows per forward, so that every forward is full."""
    return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def shared(
    out: Path, config: TrlConfig, device: torch.device, *, rows: int, most: int, steps: int, lr: float, seed: int
) -> dict[str, Any]:
    """What both trainers are told. Logs go through a callback, so `report_to` stays empty."""
    per_forward = micro_batch(rows, most)
    return {
        "output_dir": str(out),
        "max_steps": steps,
        "learning_rate": lr,
        "seed": seed,
        "per_device_train_batch_size": per_forward,
        "gradient_accumulation_steps": rows // per_forward,
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": config.bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "use_liger_kernel": liger_of(config, device),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def sft(
    out: Path, config: TrlConfig, rubric: RubricConfig, device: torch.device, *, rows: int, seed: int, steps: int
) -> Any:
    """SFTConfig of a warm-up on tokenised rows; the learning rate rises for a tenth of the steps, then falls."""
    from trl import SFTConfig

    base = shared(out, config, device, rows=rows, most=config.micro_batch, steps=steps, lr=rubric.sft_lr, seed=seed)
    return one_gpu(
        SFTConfig(
            **base,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        )
    )


def grpo(
    out: Path,
    config: TrlConfig,
    rubric: RubricConfig,
    device: torch.device,
    *,
    rows: int,
    most: int,
    lr: float,
    seed: int,
    **more: Any,
) -> Any:
    """GRPOConfig of METHOD.md section 5: per-sequence mean, asymmetric clip, groups normalised, rows in given order."""
    from trl import GRPOConfig

    return one_gpu(
        GRPOConfig(
            **shared(out, config, device, rows=rows, most=most, steps=rubric.steps, lr=lr, seed=seed),
            lr_scheduler_type="constant",
            num_generations=rubric.group_size,
            temperature=rubric.temperature,
            max_completion_length=rubric.max_tokens,
            beta=rubric.kl,
            epsilon=rubric.clip_low,
            epsilon_high=rubric.clip_high,
            loss_type="grpo",
            scale_rewards="group",
            shuffle_dataset=False,
            **more,
        )
    )


def vllm(config: TrlConfig) -> dict[str, Any]:
    """GRPOConfig's part about vLLM."""
    if config.rollouts != "vllm":
        return {}
    where = (
        {"vllm_server_base_url": config.vllm_server}
        if config.vllm_mode == "server"
        else {"vllm_gpu_memory_utilization": config.vllm_memory}
    )
    return {"use_vllm": True, "vllm_mode": config.vllm_mode, **where}


def one_gpu(args: Any) -> Any:
    """The same arguments on one GPU: with several in sight and one process, the Trainer would split batches over all
    of them by DataParallel, which TRL refuses."""
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args
