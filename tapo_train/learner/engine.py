"""The door to DeepSpeed: nothing else in the package imports it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tapo_train.learner import distributed
from tapo_train.learner.settings import LearnerSettings, rate_factor

if not torch.cuda.is_available():
    # Decided at import; unset, DeepSpeed searches for a card and warns.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed


def start(
    module: nn.Module, *, settings: LearnerSettings, device: torch.device
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `module`, with optimizer and schedule.

    The process group must be up (`distributed.init`). The caller owns the accumulation
    of gradients: any number of `backward`, then one `step`.
    """
    _join_group(device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, settings, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, settings=settings))
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=engine_config(settings),
        dist_init_required=False,
    )
    if distributed.world_size() == 1 and settings.plain_optimizer:
        # A sum over one rank is a copy of every gradient and back.
        engine.enable_backward_allreduce = False
    return engine


@contextmanager
def sharded_loading(*, settings: LearnerSettings, device: torch.device) -> Iterator[None]:
    """Hugging Face models loaded inside are sharded while they are made (ZeRO-3 only).

    Each module's weights are dealt out to the ranks as soon as it exists, and filled from the
    mapped file afterwards: no rank ever holds a whole model.
    """
    if settings.zero_stage < 3:
        yield
        return
    from transformers.integrations import deepspeed as transformers_deepspeed

    _join_group(device)
    # from_pretrained looks it up; it is forgotten as soon as nothing refers to it.
    config = transformers_deepspeed.HfDeepSpeedConfig(engine_config(settings))
    try:
        yield
    finally:
        del config
        transformers_deepspeed.unset_hf_deepspeed_config()


def start_frozen(module: nn.Module, *, settings: LearnerSettings, device: torch.device) -> Any:
    """`module` on the device for forward passes alone: sharded under ZeRO-3, else as it is."""
    if settings.zero_stage < 3:
        return module.to(device).eval()
    _join_group(device)
    engine, *_ = deepspeed.initialize(
        model=module,
        config=engine_config(replace(settings, offload_optimizer=False)),
        dist_init_required=False,
    )
    engine.eval()
    return engine


def stop_frozen(module: Any) -> None:
    """Take the hooks of sharding off again."""
    if isinstance(module, deepspeed.DeepSpeedEngine):
        distributed.barrier()
        module.destroy()


def engine_config(settings: LearnerSettings) -> dict[str, Any]:
    """DeepSpeed's configuration, as dictionary."""
    bf16 = settings.precision == "bf16"
    types: dict[str, Any] = {"keep_in_fp32_modules": ["rotary_emb", "rotary_pos_emb"]}
    if bf16 and settings.zero_stage > 0:
        # Without sharding DeepSpeed knows gradients of the weights' own type only.
        types["grad_accum_dtype"] = "fp32"
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": settings.bucket_elements,
        "allgather_bucket_size": settings.bucket_elements,
    }
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": settings.persistent_elements,
            "stage3_max_live_parameters": settings.live_elements,
            "stage3_max_reuse_distance": settings.live_elements,
            # Otherwise it puts its own function in the place of torch's, for good.
            "memory_efficient_linear": False,
        }
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Without a wrapper around the optimizer the policy clips: DeepSpeed would neither
        # report the norm there nor stop at one that is not finite.
        "gradient_clipping": 0.0 if settings.plain_optimizer else settings.max_grad_norm,
        "bf16": {"enabled": bf16},
        "communication_data_type": "fp32",
        "data_types": types,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def set_updates(engine: deepspeed.DeepSpeedEngine, updates: int) -> None:
    """Put the schedule where it is after so many updates, with the rates of its settings."""
    schedule = engine.lr_scheduler
    schedule.last_epoch = updates
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(updates)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


def abandon_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """Clear up after a step that a hook of the plain optimizer ended with an error."""
    engine.zero_grad()
    # Left as it is, every backward pass of the next update would be reduced over the ranks.
    engine._running_engine_step = False


def forget_sums(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drop the gradients of a step that was skipped, where DeepSpeed keeps them.

    With an offloaded optimizer in bfloat16, ZeRO-1 and 2 sum them in float32 and leave out to
    drop the sums: one that is no number would have every later step skipped too.
    """
    if getattr(engine.optimizer, "cpu_offload", False):
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def offload_states(engine: Any, *, device: torch.device) -> None:
    """Move what only an update needs (master weights, optimizer states) to the host's memory.

    DeepSpeed can do so for ZeRO-2; for ZeRO-1 not in bfloat16, for ZeRO-3 only with an
    optimizer of its own.
    """
    if not engine.optimizer.offloaded_states:
        kinds = deepspeed.runtime.zero.offload_config.OffloadStateTypeEnum
        engine.offload_states(
            include=[kinds.optim_states, kinds.hp_params], pin_memory=device.type == "cuda"
        )


def reload_states(engine: Any) -> None:
    """Undo `offload_states`."""
    if engine.optimizer.offloaded_states:
        engine.reload_states()


def gathered(parameters: list[nn.Parameter], *, settings: LearnerSettings) -> Any:
    """A context in which `parameters` are whole on every rank (ZeRO-3 shards them)."""
    return deepspeed.zero.GatheredParameters(parameters, enabled=settings.zero_stage == 3)


def full_size(parameter: nn.Parameter) -> int:
    """Number of elements of a parameter, sharded or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def end_process_group() -> None:
    """Leave the process group, if there still is one.

    Call after every engine has been destroyed. Another library in the process may have
    taken the group down before.
    """
    gc.collect()
    if distributed.is_initialised():
        deepspeed.comm.destroy_process_group()


def _join_group(device: torch.device) -> None:
    """Let DeepSpeed use the process group that is up."""
    if device.type == "cpu":
        # An op that gloo does not need; DeepSpeed would compile it for a minute at start,
        # fail without a compiler and hang for ever on a lock that a killed build left.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _optimizer(
    parameters: list[nn.Parameter], settings: LearnerSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Torch's own optimizers: DeepSpeed's compile on first use."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=not settings.offload_optimizer or device.type == "cpu",
    )
