"""What the command `train` does, from a checked recipe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from transformers.utils import logging as transformers_logging

from tapo_train import build
from tapo_train.build.custom import CustomSink
from tapo_train.learner import distributed
from tapo_train.learner.nonfinite import NonFiniteGuard
from tapo_train.learner.policy import Policy
from tapo_train.recipe.compose import Recipe, recipe_to_show, to_yaml
from tapo_train.report.live_console import open_console
from tapo_train.report.manifest import describe_data, describe_model, describe_process
from tapo_train.report.metrics_file import MetricsFile
from tapo_train.report.plots import plot_metrics
from tapo_train.report.run_folder import RunFolder
from tapo_train.report.sinks import Sink
from tapo_train.rollout.engine import Engine
from tapo_train.training.parts import Parts
from tapo_train.training.resume import RECIPE, check_resumption, checkpoints_of
from tapo_train.training.trainer import Trainer
from tapo_train.training.watchdog import Watchdog
from tapo_train.types import Task

transformers_logging.disable_progress_bar()
# DeepSpeed's calls of torch, told once on each rank between the lines of a run's progress.
warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def train(recipe: Recipe, *, engine: Engine | None = None) -> Path | None:
    """Run a recipe to its end, or on from its last checkpoint; the exported policy's folder.

    A run that was asked to stop is checkpointed and not exported: None. A lent `engine` samples in
    place of the recipe's own and stays open.
    """
    build.require_custom_parts(recipe)
    with ExitStack() as ending:
        return _train(recipe, ending, engine)


def _train(recipe: Recipe, ending: ExitStack, engine: Engine | None) -> Path | None:
    # The watchdog knows a slow rank from one that hangs; a collective's timeout does not.
    distributed.init(
        device=build.DEVICE, timeout_s=max(distributed.DEFAULT_TIMEOUT_S, 4 * recipe.run.stall_s)
    )
    folder = RunFolder(recipe.run.dir)
    check_resumption(recipe, folder)
    check_dashboard(recipe)
    watchdog = Watchdog(folder.path, stall_s=recipe.run.stall_s)
    tasks = build.chosen_tasks(recipe, build.read_tasks(recipe.data.train, recipe))
    validation = build.validation_tasks(recipe)
    build.require_enough(recipe, tasks)
    parts = make_parts(recipe, folder, tasks, validation, watchdog, ending, engine)
    manifest = {
        **describe_process(),
        "model": describe_model(recipe.model.path),
        "data": describe_data({"train": parts.tasks, "validation": parts.validation}),
        "seed": recipe.run.seed,
    }

    def open_sinks(step: int) -> list[Sink]:
        if distributed.rank() != 0:
            return []
        changed = folder.begin(recipe=to_yaml(recipe), manifest=manifest, step=step)
        if changed:
            print(f"going on with other data: {changed}", flush=True)
        console = open_console(total_steps=recipe.run.steps, first_step=step)
        watchdog.told = console.enter
        return [console, *make_sinks(recipe, folder, step)]

    is_done = Trainer(parts, build.build_schedule(recipe)).fit(open_sinks)
    if is_done:
        watchdog.enter("export")
        export(recipe, parts.policy, folder.export)
        if distributed.rank() == 0:
            plot_metrics(folder.metrics, folder.curves)
    watchdog.close()
    parts.reference.close()
    parts.policy.close()
    if engine is None:
        parts.engine.close()
    return folder.export if is_done else None


def make_parts(
    recipe: Recipe,
    folder: RunFolder,
    tasks: Sequence[Task],
    validation: Sequence[Task],
    watchdog: Watchdog,
    ending: ExitStack,
    engine: Engine | None = None,
) -> Parts:
    """Everything the trainer works with.

    Args:
        ending: what has to be closed however the run ends is entered here.
        engine: the sampler; None makes the recipe's.
    """
    chat = build.build_chat(recipe)
    build.require_memory(recipe)
    toolbox = ending.enter_context(closing(build.build_toolbox(recipe, decoder=chat.decoder)))
    tasks, validation = build.playable_splits(recipe, tasks, validation, chat, toolbox)
    policy = build.build_policy(recipe, chat, on_progress=watchdog.beat)
    engine = engine or build.build_engine(recipe, chat)
    watchdog.calls = toolbox.under_way
    watch, interruption = build.build_watch(recipe), build.build_interruption(engine)
    score = build.build_scoring(recipe, toolbox, ending)
    player = build.build_player(recipe, engine, chat, toolbox, score, on_progress=watchdog.beat)
    order = build.build_order(recipe, tasks)
    return Parts(
        tasks=tasks,
        validation=validation,
        order=order,
        engine=engine,
        sharing=build.build_sharing(recipe, policy, engine),
        play=player.play,
        rounds=build.build_rounds(recipe, tasks, order, player, interruption),
        audit=build.build_audit(recipe, toolbox, folder.spending),
        process=build.build_process(recipe, chat, policy, engine, score, player.driver),
        advantage=build.build_advantage(recipe.algo.advantage),
        credit=build.build_credit(recipe),
        exchange=build.build_exchange(recipe, policy),
        policy=policy,
        reference=build.build_reference(recipe, policy, chat, on_progress=watchdog.beat),
        objective=build.build_objective(recipe),
        nonfinite=NonFiniteGuard(
            folder.nonfinite, rank=distributed.rank(), skip=recipe.learner.on_nonfinite == "skip"
        ),
        checkpoints=checkpoints_of(recipe, folder, policy),
        stateful={"watch": watch},
        watch=watch,
        watchdog=watchdog,
        interruption=interruption,
        dump=build.build_dump(recipe, folder.path, chat),
        probe=build.build_probe(recipe, engine, chat, toolbox, tasks[0], player.driver),
    )


def export(recipe: Recipe, policy: Policy, folder: Path) -> None:
    """Write the policy in Hugging Face format, with the recipe it acts by."""
    policy.export(folder)
    if distributed.rank() == 0:
        (folder / RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    distributed.barrier()


def check_dashboard(recipe: Recipe) -> None:
    """On the rank that logs; raises `ConfigError` if it could not."""
    if recipe.run.wandb != "disabled" and distributed.rank() == 0:
        from tapo_train.report.wandb_sink import require_login

        require_login(recipe.run.wandb)


def make_sinks(recipe: Recipe, folder: RunFolder, step: int) -> list[Sink]:
    """Metrics file, what the recipe names and, unless disabled, wandb."""
    sinks: list[Sink] = [MetricsFile(folder.metrics, resume_step=step)]
    if recipe.report.sink is not None:
        sinks.append(CustomSink(recipe.report.sink))
    if recipe.run.wandb != "disabled":
        from tapo_train.report.wandb_sink import WandbSink

        sinks.append(
            WandbSink(
                folder.path,
                name=folder.path.name,
                mode=recipe.run.wandb,
                config=recipe_to_show(recipe),
                samples=recipe.report.wandb_samples,
            )
        )
    return sinks
