"""A run on TPUs: a plan in, a run folder out, in the layout of `train.run`."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from gemma_tune.data.build import Prepared, build
from gemma_tune.errors import AccessError, Stopped, TrainingError
from gemma_tune.gemma.families import FAMILIES, Family, text_only
from gemma_tune.gemma.shape import Shape
from gemma_tune.models.reference import resolve
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.types import Plan
from gemma_tune.tpu import model as gemma
from gemma_tune.tpu.order import batches
from gemma_tune.tpu.plan import Mesh, total_steps
from gemma_tune.tpu.step import CHUNK, IGNORED, make_score, make_step, optimizer, schedule, split
from gemma_tune.tpu.weights import Tensors, save_adapter
from gemma_tune.train import checkpoint, provenance
from gemma_tune.train.identity import identity_of
from gemma_tune.train.session import Resume, RunFolder
from gemma_tune.train.signals import Signals

_LIBRARIES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "google-tunix", "qwix", "transformers")
_SHOWN_SECONDS = 10.0


def run_plan(plan: Plan, shape: Shape, recipe_text: str, *, resume: Resume, console: Console) -> dict[str, Any]:
    """Train as `plan` says and fill its run folder. Returns `results` of run.json.

    Raises:
        UserError, AccessError: before anything is written.
        TrainingError: the loss or the adapter is not finite, or the disk is full; earlier checkpoints are intact.
        Stopped: a signal came; a checkpoint is on disk if the training had begun.
    """
    if jax.process_count() > 1:
        raise AccessError("JAX runs on several hosts, and this on one", fix="use the chips of one host, e.g. v5e-8")
    folder = RunFolder(plan.values("session")["output"], resume=resume)
    with Signals() as signals:
        folder.check()
        run = _Run(plan, shape, folder, signals, console)
        search = folder.find_checkpoint(run.identity)
        for path, reason in search.skipped:
            console.print(f"passed over {path.name}: {reason}", highlight=False)
        earlier = folder.saved_record()
        if search.found and earlier.get("status") == "finished":
            console.print(f"the run in {folder.path} is finished", highlight=False)
            return dict(earlier["results"])
        run.load(search.found)
        folder.open(recipe_text=recipe_text, plan=plan, record=run.record(), resumed=search)
        status = "failed"
        try:
            with checkpoint.disk_errors(folder.path):
                results = run.train()
            status = "finished"
            return results
        except Stopped:
            status = "stopped"
            raise
        finally:
            with suppress(OSError):
                folder.close(status, step=run.step)


class _Run:
    """One execution of a plan. Everything up to the weights is read on construction."""

    def __init__(self, plan: Plan, shape: Shape, folder: RunFolder, signals: Signals, console: Console) -> None:
        self.plan, self.shape, self.folder, self.signals, self.console = plan, shape, folder, signals, console
        self.trainer, self.session = plan.values("trainer"), plan.values("session")
        chosen = plan.values("model")
        family = FAMILIES[plan.family]
        self.family: Family = (
            text_only(family) if chosen["text_only"] else family
        )  # the adapter's names are its class's
        other = chosen["tokenizer"]
        self.tokenizer = load_tokenizer(other or chosen["name"], None if other else chosen["revision"], self.family)
        encoder = GemmaEncoder(self.tokenizer, self.family)
        self.data: Prepared = build(self.family, encoder, **plan.values("data"))
        self.source = resolve(chosen["name"], chosen["revision"])
        self.revision = self.source.revision or provenance.fingerprint(self.source.path)
        self.identity = identity_of(plan, fingerprint=self.data.fingerprint, revision=self.revision)
        train = self.data.train
        self.count, self.micro = len(train), self.trainer["per_device_train_batch_size"]
        self.passes = self.trainer["gradient_accumulation_steps"]
        epochs, most = self.trainer["num_train_epochs"], self.trainer["max_steps"]
        self.steps = total_steps(self.count, self.micro * self.passes, epochs, most)
        held = self.data.held_out
        self.held = [held[index] for index in range(min(len(held), self.session["evaluation"]["max_rows"]))]
        rows = [*(train[index] for index in range(self.count)), *self.held]
        # One shape for all steps: each further one would be compiled, for minutes on a large model.
        self.length = -(-max(len(row["input_ids"]) for row in rows) // CHUNK) * CHUNK
        self.step, self.seconds, self.tokens = 0, 0.0, [0, 0]
        self.timed = (0, 0.0)  # tokens and seconds of this process, without the first step

    def record(self) -> dict[str, Any]:
        """run.json at the start."""
        family = self.family
        return {
            "stage": "sft",
            "backend": "jax",
            "command": provenance.command_line(),
            "versions": {name: _version(name) for name in ("gemma-tune", *_LIBRARIES)},
            "git": provenance.git_state(),
            "machine": dict(self.plan.machine),
            "model": {"name": self.source.name, "revision": self.revision, "licence": family.licence},
            "family": family.name,
            "template": {
                "file": family.template_file,
                "revision": family.template_revision,
                "sha256": family.template_sha256,
            },
            "data": self.data.about(),
            "seed": self.session["seed"],
            "base": self._sizes(),
            "identity": dict(self.identity),
        }

    def _sizes(self) -> dict[str, int]:
        """Bytes of the base, and of what one chip holds of it."""
        arrays = self.frozen.values()
        whole = sum(one.size * one.dtype.itemsize for one in arrays)
        a_chip = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in arrays)
        return {"bytes": whole, "bytes_a_chip": a_chip}

    def load(self, found: checkpoint.Checkpoint | None) -> None:
        """Weights onto the chips, the adapter from `found`, and the two functions that are compiled."""
        mesh = gemma.device_mesh(Mesh(**self.plan.machine["mesh"]))
        dtype = self.plan.values("model")["dtype"]
        if dtype == "float32":  # TPUs multiply fp32 in one pass of bf16 unless they are told not to
            jax.config.update("jax_default_matmul_precision", "highest")
        config = read_json(self.source.path / "config.json")
        nf4 = bool(self.plan.values("quantization").get("load_in_4bit"))
        model = gemma.build(
            self.family,
            self.shape,
            config.get("text_config", config),
            gemma.Builder(mesh, jnp.dtype(dtype), nf4, Tensors(self.source.path)),
            self.plan.values("lora"),
            seed=self.session["seed"],
            recompute=self.trainer["gradient_checkpointing"],
        )
        self.mesh = mesh
        self.params, join, self.frozen = split(model)
        update = optimizer(self.trainer, self.steps)
        whole = NamedSharding(mesh, PartitionSpec())
        state = update.init(self.params)
        self.state = jax.tree.map(lambda one: one if one.ndim else jax.device_put(one, whole), state)
        softcap = self.family.final_softcap
        self.train_step = make_step(join, update, mesh, softcap, self.params, self.state)
        self.score = jax.jit(make_score(join, mesh, softcap))
        if found is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._tree())
            with ocp.StandardCheckpointer() as reader:
                tree = reader.restore((found.folder / "state").resolve(), target)
            self.params, self.state = tree["adapter"], tree["optimizer"]
            self.step, self.seconds = found.step, found.progress["train_seconds"]
            self.tokens = [found.progress["tokens_seen"], found.progress["tokens_trained"]]

    def _tree(self) -> dict[str, Any]:
        return {"adapter": self.params, "optimizer": self.state}

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """All steps that are left, then the results."""
        evaluation, saving = self.session["evaluation"]["every"], self.session["checkpoint"]
        evaluate, save = (every or max(1, self.steps // 10) for every in (evaluation, saving["every"]))
        rate, key = schedule(self.trainer, self.steps), jax.random.key(self.session["seed"])
        results = self.folder.record["results"]
        if self.step == 0:
            results["base"] = self._evaluate()
            self.folder.write_record()
        self.signals.arm()
        shown, last = time.monotonic(), None
        first = True
        for rows in self._batches():
            begun = time.monotonic()
            batch = self._batch(rows, self.passes)
            with self.mesh:
                found = self.train_step(self.params, self.state, self.frozen, batch, jax.random.fold_in(key, self.step))
            self.params, self.state, loss, norm = found[0], found[1], float(found[2]), float(found[3])
            done, self.step = self.step, self.step + 1
            taken, seen = time.monotonic() - begun, sum(len(row["input_ids"]) for row in rows)
            self.tokens[0] += seen
            self.tokens[1] += sum(sum(label != IGNORED for label in row["labels"][1:]) for row in rows)
            if first:  # nearly all of it is compilation, which the figures leave out
                first = False
                self.console.print(f"first step, compiled, in {taken:.0f} s", highlight=False)
            else:
                self.seconds += taken
                self.timed = (self.timed[0] + seen, self.timed[1] + taken)
            if self.step % self.session["tracking"]["log_every"] == 0 or self.step == self.steps:
                self._log({"loss": loss, "grad_norm": norm, "learning_rate": float(rate(done))})
            if not math.isfinite(loss + norm):
                raise TrainingError(
                    f"the loss of step {self.step} is {loss}, its gradient {norm}",
                    where=str(self.folder.path),
                    fix="lower optim.learning_rate, and go on from the last checkpoint with --resume auto",
                )
            if time.monotonic() - shown > _SHOWN_SECONDS or self.step == self.steps:
                shown = time.monotonic()
                self.console.print(f"step {self.step:,} of {self.steps:,}: loss {loss:.4f}", highlight=False)
            last = None
            stopping = self.signals.requested is not None
            if not stopping and (self.step % evaluate == 0 or self.step == self.steps):
                last = self._evaluate()
            if stopping or self.step % save == 0 or self.step == self.steps:
                self._save(saving["keep"])
            if stopping:
                raise Stopped(
                    f"stopped by {self.signals.requested} after step {self.step:,}; a checkpoint is saved",
                    where=str(self.folder.path),
                    fix="the same command with --resume auto continues from it",
                )
        self.signals.disarm()
        results["tuned"] = last or self._evaluate()
        before, after = (results[name].get("loss") for name in ("base", "tuned"))
        results["relative_fall"] = (before - after) / before if before and after is not None else None
        results |= {"steps": self.step, **self._counters(), "peak_memory": provenance.peak_memory()}
        results["weights"] = self._write()
        self.folder.record["results"] = results
        return results

    def _batches(self) -> Iterator[list[Mapping[str, Any]]]:
        size, seed = self.micro * self.passes, self.session["seed"]
        shuffle = self.plan.values("data")["shuffle"]
        for order in batches(self.count, size, seed, shuffle, first=self.step, steps=self.steps):
            yield [self.data.train[index] for index in order]

    def _batch(self, rows: Sequence[Mapping[str, Any]], passes: int) -> dict[str, Any]:
        """[passes, rows of a pass, length] on the chips. Rows that are missing at the end of an epoch carry no loss."""
        shape = (passes * self.micro, self.length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        labels = np.full(shape, IGNORED, np.int32)
        for place, row in enumerate(rows):
            size = len(row["input_ids"])
            tokens[place, :size], labels[place, :size] = row["input_ids"], row["labels"]
            begins = np.asarray(row["position_ids"]) == 0 if "position_ids" in row else np.arange(size) == 0
            segments[place, :size] = np.cumsum(begins)
        where = NamedSharding(self.mesh, PartitionSpec(None, "fsdp", None))
        arrays = {"tokens": tokens, "labels": labels, "segments": segments}
        return {
            name: jax.device_put(array.reshape(passes, self.micro, self.length), where)
            for name, array in arrays.items()
        }

    def _evaluate(self) -> dict[str, Any]:
        """Held-out loss, perplexity and token accuracy; empty without held-out rows."""
        if not self.held:
            return {}
        total, count, right = 0.0, 0, 0
        for first in range(0, len(self.held), self.micro):
            batch = self._batch(self.held[first : first + self.micro], 1)
            with self.mesh:
                found = self.score(self.params, self.frozen, {name: array[0] for name, array in batch.items()})
            total, count, right = total + float(found[0]), count + int(found[1]), right + int(found[2])
        loss = total / count
        figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": right / count}
        self._log({f"eval_{name}": value for name, value in figures.items()})
        self.console.print(f"step {self.step:,}: held-out loss {loss:.4f}", highlight=False)
        return {**figures, "tokens": count, "rows": len(self.held)}

    # --- what is written --------------------------------------------------------------------------------------------

    def _log(self, line: Mapping[str, Any]) -> None:
        self.folder.append("metrics.jsonl", [{"step": self.step, **line, **self._counters()}])

    def _counters(self) -> dict[str, Any]:
        tokens, seconds = self.timed
        return {
            "tokens_seen": self.tokens[0],
            "tokens_trained": self.tokens[1],
            "train_seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        }

    def _save(self, keep: int) -> None:
        def fill(staging: Path) -> None:
            with ocp.StandardCheckpointer() as writer:
                writer.save((staging / "state").resolve(), self._tree())

        progress = self._counters()
        checkpoint.save(self.folder.path, self.step, fill, identity=self.identity, progress=progress)
        checkpoint.rotate(self.folder.path, keep)

    def _write(self) -> dict[str, Any]:
        """`adapter/` in PEFT's form, in one rename."""
        staging = self.folder.path / ".staging-adapter"
        shutil.rmtree(staging, ignore_errors=True)
        revision = self.source.revision
        found = save_adapter(
            staging,
            {name: jax.device_get(value) for name, value in self.params.items()},
            self.plan.values("lora"),
            self.family,
            base=self.source.name,
            revision=revision if revision and len(revision) == 40 else None,
            tokenizer=self.tokenizer,
        )
        self.console.print(f"adapter: {json.dumps(found)}", highlight=False)
        files = checkpoint.hashes(staging)
        checkpoint.flush_all(staging)
        checkpoint.publish(staging, self.folder.path / "adapter")
        return {"folder": "adapter", "files": files}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
