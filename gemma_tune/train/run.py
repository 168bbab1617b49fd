"""A run: a plan in, a run folder out. What the stages share; each stage is a `Stage` in a module of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import IterableDataset
from rich.console import Console
from transformers import TrainingArguments, set_seed

from gemma_tune.data.build import Prepared
from gemma_tune.data.preview import preview
from gemma_tune.errors import Aborted, Stopped, TrainingError, UserError
from gemma_tune.gemma.families import FAMILIES, Family
from gemma_tune.models.load import check_vocabulary, load_base
from gemma_tune.models.lora import attach, begin_with
from gemma_tune.models.reference import ModelSource
from gemma_tune.models.tokenizer import GemmaEncoder
from gemma_tune.plan.stages import least_micro
from gemma_tune.plan.starts import adapter_folder
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.functions import load_user_function
from gemma_tune.train import checkpoint, provenance, sharding
from gemma_tune.train.callbacks import MetricsFile, ProgressDisplay, Rhythm, every_tenth, sample_rows
from gemma_tune.train.evaluate import Answer, Prompt, answers, prompt_ids, sample_prompts, stop_rate
from gemma_tune.train.identity import identity_of
from gemma_tune.train.parts import fetch, remove_shared
from gemma_tune.train.peers import missing
from gemma_tune.train.session import Resume, RunFolder, is_first_process
from gemma_tune.train.signals import Signals
from gemma_tune.train.tracking import WandbTracking
from gemma_tune.train.trainer import Figures, RunTrainer, Surroundings, agreement
from gemma_tune.train.weights import check_written

_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|ALLOC_FAILED", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Stage:
    """One algorithm: what differs from the others.

    Attributes:
        config: keywords of the plan -> the configuration of TRL's trainer.
        prepare: (family, encoder, keywords of the plan's data section) -> rows.
        trainer: (run, what surrounds it) -> the trainer of the run.
        write: (run, new folder, results) -> nothing; writes the trained weights as others read them.
        finish: (run, results) -> further results, once training and final evaluation are done.
        wrap: (base with its adapter, plan, family) -> what the trainer gets.
        answers: whether the model answers prompts before and after.
        reference: whether the adapter that the training begins with is kept, frozen, as what it is compared with.
    """

    config: Callable[..., TrainingArguments]
    prepare: Callable[..., Prepared]
    trainer: Callable[[Run, Surroundings], RunTrainer]
    write: Callable[[Run, Path, Mapping[str, Any]], None]
    finish: Callable[[Run, dict[str, Any]], dict[str, Any]] = lambda run, results: {}
    wrap: Callable[[Any, Plan, Family], Any] = lambda model, plan, family: model
    answers: bool = True
    reference: bool = False


def stage_of(plan: Plan) -> Stage:
    """The stage of `plan`: `STAGE` of the module in `train/` that has its name."""
    return import_module(f"gemma_tune.train.{plan.stage}").STAGE


@dataclass(frozen=True, slots=True)
class Materials:
    """What a run is made from, before any weight is loaded.

    `revision` tells this base from any other; `start` is the hash of the adapter that the training begins with,
    `rewards` those of the sources of rewards; `shared` is the temporary folder in which this process made the data for
    others.
    """

    family: Family
    source: ModelSource
    revision: str
    tokenizer: Any
    encoder: GemmaEncoder
    data: Prepared
    start: str | None = None
    rewards: tuple[str, ...] = ()
    shared: Path | None = None


def run_plan(
    plan: Plan, recipe_text: str, *, resume: Resume = "never", console: Console | None = None
) -> dict[str, Any]:
    """Train as `plan` says and fill its run folder. Returns `results` of run.json.

    Args:
        plan: from `plan.make_plan`.
        recipe_text: the recipe as written, for the run folder.
        resume: `never` wants a new folder, `auto` continues where it can, `must` insists on a checkpoint.
        console: where progress goes.

    Raises:
        UserError, AccessError: before anything is written.
        TrainingError: the training failed; earlier checkpoints are intact.
        Stopped: a signal came; a checkpoint is on disk if the training had begun.
        Aborted: a second Ctrl-C came.
    """
    first = is_first_process()
    console = (console or Console()) if first else Console(quiet=True)
    folder = RunFolder(plan.values("session")["output"], resume=resume, writes=first)
    with Signals() as signals, missing(signals):
        folder.check()
        trainer_config(plan)  # what it refuses is refused before anything slow
        materials = gather(plan, console)
        identity = identity_of(
            plan,
            fingerprint=materials.data.fingerprint,
            revision=materials.revision,
            start=materials.start,
            rewards=materials.rewards,
            world_size=plan.machine.get("world_size", 1),
        )
        search = folder.find_checkpoint(identity)
        for path, reason in search.skipped:
            console.print(f"passed over {path.name}: {reason}", highlight=False)
        earlier = folder.saved_record()
        if search.found and earlier.get("status") == "finished":
            console.print(f"the run in {folder.path} is finished", highlight=False)
            leave_together(plan)
            return dict(earlier["results"])
        with memory_errors(plan):
            model = load_model(plan, materials)
        wait_for_all(plan)  # every process has looked for a checkpoint before the first one moves any
        remove_shared(materials.shared)
        folder.open(recipe_text=recipe_text, plan=plan, record=describe(plan, materials, identity), resumed=search)
        wait_for_all(plan)
        run = Run(plan, materials, model, folder, identity, search.found, signals, console)
        results = run.execute()
        leave_together(plan)
        return results


def wait_for_all(plan: Plan) -> None:
    """A barrier of all processes; nothing where there is one."""
    if plan.machine.get("world_size", 1) > 1:
        PartialState(cpu=plan.machine["device"] == "cpu").wait_for_everyone()


def leave_together(plan: Plan) -> None:
    """Let no process end before all are done, and without its process group.

    A process that leaves with an open group may abort, and the launcher then kills the others, one of which still
    writes the result.
    """
    wait_for_all(plan)
    if plan.machine.get("world_size", 1) > 1:
        PartialState().destroy_process_group()


def gather(plan: Plan, console: Console) -> Materials:
    """What `plan` is made from, on this disk; of several processes the first of each node fetches it (`parts`)."""
    parts = fetch(plan, stage_of(plan).prepare, console)
    revision = parts.source.revision or provenance.fingerprint(parts.source.path)
    start = start_of(plan)
    start_hash = provenance.fingerprint(adapter_folder(start["start"])) if start else None
    return Materials(
        FAMILIES[plan.family],
        parts.source,
        revision,
        parts.tokenizer,
        parts.encoder,
        parts.data,
        start_hash,
        reward_hashes(plan),
        parts.shared,
    )


def start_of(plan: Plan) -> dict[str, Any]:
    """`{start, mode}` of the adapter that the training begins with; empty where it begins with a new one."""
    chosen = plan.values("session").get("adapter") or {}
    return chosen if chosen.get("start") else {}


def reward_hashes(plan: Plan) -> tuple[str, ...]:
    """The content hash of each source of rewards; empty where the stage has none."""
    return tuple(
        provenance.fingerprint(adapter_folder(source["source"], where="ppo.reward"))
        if source["kind"] == "model"
        else checkpoint.sha256_of(load_user_function(source["source"]).path)
        for source in plan.values("session").get("rewards", ())
    )


def load_model(plan: Plan, materials: Materials) -> Any:
    """The base of `plan`, with its adapter where it has one."""
    set_seed(plan.values("session")["seed"])  # peft draws A at random
    quantization, session = plan.values("quantization"), plan.values("session")
    # What is to be in parts need not fit a GPU whole; bitsandbytes quantises on the GPU, and a reference scores there.
    apart = session["distributed"]["strategy"] in sharding.SHARDED and not session.get("precompute_reference")
    device = "cpu" if apart and not quantization else None
    model: Any = load_base(plan.values("model"), quantization, materials.family, device=device)
    check_vocabulary(model, materials.tokenizer, materials.family)
    lora, start = plan.values("lora"), start_of(plan)
    if start:
        keep = stage_of(plan).reference
        model = begin_with(model, start["start"], lora, materials.family, mode=start["mode"], keep_frozen=keep)
    elif lora:
        model = attach(model, lora, materials.family)
    return stage_of(plan).wrap(model, plan, materials.family)


def trainer_config(plan: Plan) -> TrainingArguments:
    """The configuration of TRL's trainer. One process trains on one GPU, however many it can see.

    Raises:
        UserError: a keyword of `advanced.trainer` is unknown or refused.
    """
    keywords, distributed = plan.values("trainer"), plan.values("session")["distributed"]
    sharding.take_over(distributed, "bf16" if keywords["bf16"] else "fp16" if keywords["fp16"] else None)
    with unchecked_keywords(plan):
        config = stage_of(plan).config(**keywords)
    config.parallelism_config = sharding.mesh_of(distributed)
    if config.use_cpu and distributed["strategy"] in sharding.SHARDED:
        sharding.shard_on_cpu(config)
    if plan.machine.get("world_size", 1) == 1:
        # With more than one visible the Trainer would wrap the model in nn.DataParallel, which TRL 1.16 refuses.
        config._n_gpu = min(config.n_gpu, 1)
    return config


@contextmanager
def unchecked_keywords(plan: Plan) -> Iterator[None]:
    """Say where it came from when the libraries refuse a keyword that the recipe handed on unchecked."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, ImportError) as exc:
        keys = [key for key, choice in plan.trainer.items() if choice.reason.startswith("advanced.trainer")]
        if not keys:
            raise
        raise UserError(
            f"the trainer refuses what advanced.trainer hands it: {exc}",
            where=", ".join(f"advanced.trainer.{key}" for key in keys),
            fix="see the configuration of trl's trainer for its keywords and their values, or remove the key",
        ) from exc


def endless(stream: IterableDataset) -> IterableDataset:
    """`stream`, again and again: `max_steps` ends the run.

    Where a stream ends in the middle of an accumulated batch, the Trainer (transformers 5.23, `_run_epoch`) leaves the
    gradient that was begun lying, adds the whole next batch to it, and cannot resume behind that point.
    """

    def rows() -> Iterator[dict[str, Any]]:
        while True:
            some = False
            for row in stream:
                some = True
                yield row
            if not some:
                raise UserError(
                    "the stream has no row for training behind the held-out ones",
                    where="data.sources",
                    fix="lower data.holdout, or add rows",
                )

    return IterableDataset.from_generator(rows, features=stream.features)


def describe(plan: Plan, materials: Materials, identity: Mapping[str, Any]) -> dict[str, Any]:
    """run.json at the start: everything that was used, with its version or hash."""
    family = materials.family
    return {
        "stage": plan.stage,
        "command": provenance.command_line(),
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "machine": dict(plan.machine),
        "model": {"name": materials.source.name, "revision": materials.revision, "licence": family.licence},
        "family": family.name,
        "template": {
            "file": family.template_file,
            "revision": family.template_revision,
            "sha256": family.template_sha256,
        },
        "data": materials.data.about() | {"preview": preview_of(plan.stage, materials)},
        "seed": plan.values("session")["seed"],
        "identity": dict(identity),
    }


def preview_of(stage: str, materials: Materials) -> list[dict[str, Any]]:
    """A few rows with their loss mask, for the report; none that would have to be masked as a secret."""
    return preview(
        stage,
        materials.data,
        frozenset(materials.family.tokens.values()),
        lambda ids: str(materials.tokenizer.decode(ids, skip_special_tokens=False)),
        lambda text: provenance.redact(text) == text,
    )


class Run:
    """One execution of a plan in an opened run folder."""

    def __init__(
        self,
        plan: Plan,
        materials: Materials,
        model: Any,
        folder: RunFolder,
        identity: Mapping[str, Any],
        resumed: checkpoint.Checkpoint | None,
        signals: Signals,
        console: Console,
    ) -> None:
        self.plan = plan
        self.stage = stage_of(plan)
        self.session = plan.values("session")
        self.materials = materials
        self.model = model
        self.folder = folder
        self.identity = identity
        self.resumed = resumed
        self.signals = signals
        self.console = console
        self.step = resumed.step if resumed else 0
        self.trainer: RunTrainer
        self.prompts: list[Prompt] = []
        self.tracker: WandbTracking | None = None

    def execute(self) -> dict[str, Any]:
        """Train, write the results, and leave run.json with how it ended."""
        status, results = "failed", None
        try:
            with memory_errors(self.plan), checkpoint.disk_errors(self.folder.path):
                results = self._train()
            status = "finished"
            return results
        except Stopped:
            status = "stopped"
            raise
        except (Aborted, KeyboardInterrupt):
            status = "aborted"
            raise
        finally:
            # Where the disk is full, run.json cannot be written either: the first error is the one to report.
            with nullcontext() if results is not None else suppress(OSError):
                self.folder.close(status, step=self.step)
            if self.tracker is not None:
                self.tracker.close(results)

    def _train(self) -> dict[str, Any]:
        data = self.materials.data
        evaluation, samples = self.session["evaluation"], self.session["samples"]
        rows = data.held_out.select(range(min(len(data.held_out), evaluation["max_rows"]))) if data.held_out else []
        around = Surroundings(
            folder=self.folder,
            keep=self.session["checkpoint"]["keep"],
            identity=self.identity,
            signals=self.signals,
            held_out=rows,
            progress=self.resumed.progress if self.resumed else None,
            distributed=self.session["distributed"],
            loss_scaling=self.session["loss_scaling"],
        )
        with unchecked_keywords(self.plan):
            trainer = self.trainer = self.stage.trainer(self, around)
        if self.stage.answers:
            self.prompts = sample_prompts(samples["prompts"], data.held_out_examples, samples["held_out"])
        steps = trainer.total_steps()
        rhythm = Rhythm(
            evaluate_every=every_tenth(evaluation["every"], steps) if rows else None,
            save_every=every_tenth(self.session["checkpoint"]["every"], steps),
            sample_every=samples["every"],
            sample=lambda step: self._sample(trainer, step),
            before=lambda: self._before(trainer),
            signals=self.signals,
            agree=agreement(trainer),
        )
        progress = ProgressDisplay(self.console, lambda: trainer.counters)
        self._track(trainer)  # first: it must be there when the base's figures are logged
        trainer.add_callback(rhythm)
        trainer.add_callback(MetricsFile(self.folder, lambda: trainer.counters))
        trainer.add_callback(progress)
        try:
            self._loop(trainer, rhythm, steps)
        finally:
            self.step = trainer.state.global_step
            progress.close()
        return self._finish(trainer, rows)

    def _loop(self, trainer: RunTrainer, rhythm: Rhythm, steps: int) -> None:
        """All steps that are left. Everything random starts from the seed, or from the checkpoint's state."""
        set_seed(self.session["seed"])
        if self.resumed is None:
            trainer.train()
        elif self.resumed.step < steps:
            self.console.print(f"resuming after step {self.resumed.step:,}", highlight=False)
            trainer.train(resume_from_checkpoint=str(self.resumed.folder))
        else:  # every step was done, but not what comes after the last one
            trainer.load_trained(self.resumed.folder)
            trainer.state.global_step = self.resumed.step
            trainer.count()
        done = trainer.state.global_step
        # Also after the last step: the final figures could not be taken while a stop is asked for.
        if agreement(trainer)(self.signals.requested is not None) or rhythm.stopping:
            raise Stopped(
                f"stopped by {self.signals.requested or 'a signal'} after step {done:,}; a checkpoint is saved",
                where=str(self.folder.path),
                fix="the same command with --resume auto continues from it",
            )

    def _before(self, trainer: RunTrainer) -> None:
        """The base's figures, before the first step; then signals wait for a checkpoint."""
        if self.resumed is None:
            trainer.evaluate()
            found = self._sample(trainer, 0)
            self.folder.record["results"] = {
                "base": figures(trainer.last_evaluation, self.prompts, found),
                "answers": [
                    {
                        "prompt": prompt.label,
                        "held_out": prompt.held_out,
                        "reference": prompt.reference,
                        "base": vars_of(answer),
                    }
                    for prompt, answer in zip(self.prompts, found, strict=False)
                ],
            }
            self.folder.write_record()
        self.signals.arm()
        trainer.clock.start()

    def _sample(self, trainer: RunTrainer, step: int) -> list[Answer]:
        if not self.prompts:
            return []
        family = self.materials.family
        asked = prompt_ids(self.prompts, family, self.materials.encoder)
        with trainer.clock.paused():
            found = answers(
                trainer.model,
                self.materials.tokenizer,
                family,
                asked,
                max_new_tokens=self.session["samples"]["max_new_tokens"],
                stop=lambda: trainer.args.world_size == 1 and self.signals.requested is not None,
            )
            found = trainer.rate_answers(self.prompts, asked, found)
        if trainer.is_world_process_zero():
            self.folder.append("samples.jsonl", sample_rows(step, self.prompts, found))
        return found

    def _finish(self, trainer: RunTrainer, rows: Sequence[Any]) -> dict[str, Any]:
        """Final figures and answers, the trained weights, and `results` of run.json."""
        trainer.clock.stop()
        self.signals.disarm()
        if rows and trainer.evaluated_at != trainer.state.global_step:
            trainer.evaluate()
        found = self._sample(trainer, trainer.state.global_step)
        results = dict(self.folder.record["results"])
        results["tuned"] = figures(trainer.last_evaluation, self.prompts, found)
        for row, answer in zip(results.get("answers", []), found, strict=False):
            row["tuned"] = vars_of(answer)
        results |= self.stage.finish(self, results)
        results |= {"steps": trainer.state.global_step, **trainer.counters, "peak_memory": provenance.peak_memory()}
        if sharding.is_sharded(trainer.model):
            sharding.make_whole(trainer.model, writes=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            results["weights"] = self._write_weights(results)
        self.folder.record["results"] = results
        return results

    def _write_weights(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """The result, in one rename: `adapter/` in PEFT's form, or `model/` after a full fine-tune."""
        name = "adapter" if self.plan.lora else "model"
        staging = self.folder.path / f".staging-{name}"
        shutil.rmtree(staging, ignore_errors=True)
        self.stage.write(self, staging, results)
        if self.plan.lora:
            stacked = start_of(self.plan).get("mode") == "stack"
            check_written(self.trainer.model, staging, moved=False, stacked=stacked)
        files = checkpoint.hashes(staging)
        checkpoint.flush_all(staging)
        checkpoint.publish(staging, self.folder.path / name)
        return {"folder": name, "files": files}

    def _track(self, trainer: RunTrainer) -> None:
        tracking = self.session["tracking"]
        if not tracking["wandb"]:
            return
        config = {name: self.plan.values(name) for name in ("model", "quantization", "lora", "trainer", "data")}
        self.tracker = WandbTracking(
            folder=self.folder.path,
            project=tracking["project"],
            name=tracking["name"] or self.folder.path.name,
            run_id=self.folder.record.get("wandb", {}).get("id"),
            config=config,
            counters=lambda: trainer.counters,
            console=self.console,
            started=lambda facts: self.folder.write_record(wandb=facts),
        )
        trainer.add_callback(self.tracker)


def figures(found: Figures | None, prompts: Sequence[Prompt], given: Sequence[Answer]) -> dict[str, Any]:
    """Held-out figures of one model, with `stop_rate`, `answers` and `ended` where it answered prompts.

    The stop rate counts held-out prompts, or the recipe's own where there are no others.
    """
    result = found.to_json() if found is not None else {}
    if not prompts:
        return result
    counted = [answer for prompt, answer in zip(prompts, given, strict=False) if prompt.held_out] or list(given)
    ended = sum(answer.ended for answer in counted)
    return result | {"stop_rate": stop_rate(counted), "ended": ended, "answers": len(counted)}


def vars_of(answer: Answer) -> dict[str, Any]:
    shown = {"text": answer.text, "ended": answer.ended, "tokens": answer.tokens}
    return shown if answer.score is None else shown | {"score": answer.score}


@contextmanager
def memory_errors(plan: Plan) -> Iterator[None]:
    """Say what to change where memory runs out, on a GPU or a CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not isinstance(exc, MemoryError) and not _NO_MEMORY.search(str(exc)):
            raise
        trainer, data = plan.values("trainer"), plan.values("data")
        micro = trainer.get("per_device_train_batch_size")
        length = data.get("max_length", 0) + trainer.get("max_new_tokens", 0)  # in ppo the former is a prompt's
        raise TrainingError(
            f"out of memory with batch.micro {micro} and data.max_length {length}",
            where=str(exc).splitlines()[0][:200] if str(exc) else "",
            fix=f"set batch.micro: {least_micro(plan.stage)} (batch.size stays), memory.gradient_checkpointing: true, "
            "or lower data.max_length",
        ) from exc
