"""From a recipe to the parts of a run: the sampler and how it plays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tapo_train import recipe as recipes
from tapo_train.build.custom import custom_part
from tapo_train.build.device import DEVICE
from tapo_train.build.limits import limits_of, packed_tokens
from tapo_train.errors import ConfigError
from tapo_train.learner.policy import Policy
from tapo_train.recipe.compose import Recipe
from tapo_train.rollout.chat import ChatFormat
from tapo_train.rollout.collect import collect
from tapo_train.rollout.driver import EngineDriver
from tapo_train.rollout.engine import Engine, Sampling
from tapo_train.rollout.group import Score
from tapo_train.rollout.limits import Deadlines, Limits
from tapo_train.rollout.model_folder import require_model_folder
from tapo_train.rollout.seats import MOST, Seats
from tapo_train.rollout.tensor_parallel import GroupPlay, MirroredEngine
from tapo_train.tools.toolbox import Toolbox
from tapo_train.training.interruption import Interruption
from tapo_train.training.parts import Play
from tapo_train.training.process import PolicyAccess, Processes
from tapo_train.types import Group, Task


def build_chat(recipe: Recipe) -> ChatFormat:
    """Messages and tokens of the recipe's model, whose folder is looked at first.

    Raises:
        ConfigError: the folder is missing, incomplete or damaged, or the recipe names tools of
            pictures for a model that takes none.
    """
    folder, reader = Path(recipe.model.path), recipe.model.call_reader
    require_model_folder(folder)
    chat = ChatFormat(
        folder,
        picture_cache_bytes=int(recipe.learner.picture_cache_gib * 2**30),
        read_call=custom_part(reader, where="model.call_reader") if reader else None,
    )
    blind = [name for name in recipe.tools.names if name != "text_search_tool"]
    if blind and not chat.family.sees:
        raise ConfigError(
            f"tools.names: found {', '.join(blind)}, wanted no tool of pictures: {folder} is of "
            f"{chat.family.name}, which takes none"
        )
    return chat


def build_local_engine(
    recipe: Recipe,
    chat: ChatFormat,
    engine: recipes.VllmSettings | recipes.HfSettings,
    *,
    seed: int,
) -> Engine:
    """A sampler in this process."""
    if engine.name == "hf":
        from tapo_train.rollout.hf_engine import HfEngine

        dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
        return HfEngine(chat, dtype=dtype, device=DEVICE, seed=seed)
    from tapo_train.rollout.vllm_engine import VllmEngine, VllmOptions

    return VllmEngine(
        chat,
        VllmOptions(
            dtype=recipe.model.dtype,
            max_model_len=recipe.rollout.max_tokens,
            max_num_seqs=recipe.rollout.max_in_flight or MOST,
            memory_fraction=engine.gpu_memory_utilization,
            cache_gib=engine.kv_cache_gib,
            picture_cache_bytes=int(engine.picture_cache_gib * 2**30),
            max_images=most_images(recipe),
            can_sleep=sleeps_in_update(recipe),
            seeded=samples_by_seed(recipe),
            seed=seed,
            tensor_parallel=engine.tensor_parallel,
        ),
    )


def sleeps_in_update(recipe: Recipe) -> bool:
    """Whether the engine in this process gives its memory back while the learner learns.

    Raises:
        ConfigError: it should, without a GPU.
    """
    engine = recipe.rollout.engine
    if engine.name != "vllm" or not engine.sleep_in_update:
        return False
    if DEVICE == "cpu":
        raise ConfigError(
            "rollout.engine.sleep_in_update: found true without a GPU, wanted false: vLLM can "
            "give back the memory of a GPU only"
        )
    if engine.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.engine.sleep_in_update: found true with tensor_parallel = "
            f"{engine.tensor_parallel}, wanted false: engines that ranks share do not sleep yet"
        )
    return True


def build_play(
    recipe: Recipe,
    engine: Engine,
    chat: ChatFormat,
    toolbox: Toolbox,
    score: Score,
    *,
    limits: Limits | None = None,
    driver: EngineDriver | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Play:
    """Rollouts with the recipe's prompt, tools and limits; trajectories come scored.

    Args:
        score: gives a trajectory its reward.
        limits: others than the recipe's.
        driver: of the engine, where a thread of its own steps it.
        on_progress: called when the engine has computed or a turn has ended.
    """
    rollout = recipe.rollout
    limits = limits or limits_of(recipe)
    seed = recipe.run.seed if samples_by_seed(recipe) else None
    seats = Seats(engine=engine)

    def play(
        tasks: Sequence[Task], *, rollouts: int, greedy: bool, policy_version: int
    ) -> list[Group]:
        temperature = 0.0 if greedy else rollout.temperature
        groups = collect(
            tasks,
            engine=engine,
            chat=chat,
            toolbox=toolbox,
            system_prompt=recipe.data.system_prompt,
            rollouts_per_task=rollouts,
            limits=limits,
            sampling=Sampling(temperature=temperature, seed=seed),
            policy_version=policy_version,
            max_in_flight=rollout.max_in_flight or seats.free(),
            deadlines=deadlines_of(rollout.deadlines, greedy=greedy),
            oversample=1.0 if greedy else rollout.oversample,
            score=score,
            driver=driver,
            on_progress=on_progress,
        )
        seats.observe(groups)
        return groups

    return GroupPlay(play, engine) if isinstance(engine, MirroredEngine) else play


def build_process(
    recipe: Recipe,
    chat: ChatFormat,
    policy: Policy,
    engine: Engine,
    score: Score,
    driver: EngineDriver | None,
) -> Processes:
    """What the recipe names between rollout and advantage.

    Raises:
        ConfigError: it names something on an engine that ranks share.
    """
    named = recipe.reward.process
    if named and isinstance(engine, MirroredEngine):
        raise ConfigError(
            "reward.process: found a stage with rollout.engine.tensor_parallel > 1; wanted none: "
            "an engine that ranks share can only be asked by all of them together"
        )
    seed = recipe.run.seed if samples_by_seed(recipe) else None
    return Processes(
        stages=[custom_part(stage, where="reward.process") for stage in named],
        access=PolicyAccess(
            chat=chat,
            policy=policy,
            engine=engine,
            score=score,
            sampling=Sampling(temperature=recipe.rollout.temperature, seed=seed),
            budget_tokens=packed_tokens(recipe, chat.family),
            driver=driver,
        ),
    )


def build_interruption(engine: Engine) -> Interruption:
    """SIGTERM; a rollout on an engine that ranks share is not given up."""
    return Interruption(gives_up=not isinstance(engine, MirroredEngine))


def deadlines_of(wanted: recipes.DeadlineSettings, *, greedy: bool) -> Deadlines:
    """An evaluation has to be finished, however long it takes."""
    return Deadlines(
        turn_s=wanted.turn_s or math.inf,
        trajectory_s=wanted.trajectory_s or math.inf,
        step_s=math.inf if greedy else wanted.step_s or math.inf,
    )


def samples_by_seed(recipe: Recipe) -> bool:
    """Whether each request draws from a stream of its own, derived from seed and request id.

    Then a run does not depend on the order of requests or the number of ranks, and a
    resumed one samples what an uninterrupted one would have. On GPUs one generator per
    request costs more than that is worth.
    """
    return recipe.rollout.engine.name == "hf" or DEVICE == "cpu"


def most_images(recipe: Recipe) -> int:
    """Pictures one trajectory may hold: the question's and those of every call."""
    rollout = recipe.rollout
    calls = rollout.max_turns * rollout.max_parallel_calls
    return 16 + calls * max(1, recipe.tools.image_top_k)
