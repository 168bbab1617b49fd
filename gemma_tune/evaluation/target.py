"""What is evaluated: a run, an adapter, a plain model or a GGUF file; found, checked, and opened to speak."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gemma_tune import console
from gemma_tune.errors import UserError
from gemma_tune.evaluation.result import FILE
from gemma_tune.gemma.families import Family, family_of
from gemma_tune.gemma.licences import last_name
from gemma_tune.models.gguf_files import find_gguf, open_gguf
from gemma_tune.models.load import dtype_of_machine, load_base, on_gpu, residual_exponent_of
from gemma_tune.models.lora import WEIGHTS, add_saved
from gemma_tune.models.reference import resolve
from gemma_tune.models.reward import RewardHead, RewardModel, base_of, check_stats, open_head, read_stats
from gemma_tune.models.roles import REFERENCE, TRAINED, reference_adapters, speak_as, speaking_as
from gemma_tune.models.saved import Saved, find_saved, open_saved
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import adapter_folder, is_reward_model
from gemma_tune.plan.types import Choice, MemoryTerm, Plan
from gemma_tune.train.checkpoint import sha256_of
from gemma_tune.train.provenance import fingerprint

Voice = Literal["base", "tuned"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is evaluated, as it lies on the disk.

    Attributes:
        name: as the user named it.
        saved: base, adapter and plan.json; of a GGUF file nothing.
        gguf: the file, where it is one.
        folder: the run whose final result it is; None for anything else.
        plan, run: plan.json and run.json of the run that it is of, or that made it; None and empty without one.
    """

    name: str
    saved: Saved | None
    gguf: Path | None
    folder: Path | None
    plan: Plan | None
    run: Mapping[str, Any]

    @property
    def adapter(self) -> Path | None:
        return self.saved.adapter if self.saved else None

    @property
    def is_reward(self) -> bool:
        return self.adapter is not None and is_reward_model(self.adapter)

    @property
    def tuned(self) -> bool:
        """Whether something of ours or of PEFT's was trained: an adapter, or all weights of a run."""
        return self.adapter is not None or self.plan is not None

    @property
    def file(self) -> Path:
        """Where its evaluation goes: into its run, or into the working directory under its name."""
        if self.folder:
            return self.folder / FILE
        return Path(f"{last_name(self.name.rstrip('/')).split(':')[-1]}.{FILE}")

    def subject(self) -> dict[str, Any]:
        """`subject` of evaluation.json. `adapter_sha256` is of adapter_model.safetensors alone."""
        about: dict[str, Any] = {"target": self.name, "base": self.name, "revision": None}
        about |= {"adapter_sha256": None, "content": None}
        if self.saved is None:
            assert self.gguf is not None
            return about | {"content": f"sha256:{sha256_of(self.gguf)}"}
        about["base"] = self.saved.name
        source = resolve(self.saved.name, self.saved.revision, need="config")
        about["revision"] = self.saved.revision or source.revision
        if about["revision"] is None:
            about["content"] = fingerprint(source.path)
        if self.adapter:
            about["adapter_sha256"] = sha256_of(self.adapter / WEIGHTS)
        return about


def find_target(name: str) -> Target:
    """Look at what `name` is. Reads no weights.

    Raises:
        UserError: there is nothing, it is an unfinished run, or its base is another one than it was trained on.
        AccessError: the hub cannot be reached.
    """
    gguf = find_gguf(name)
    if gguf is not None:
        return Target(name, None, gguf, None, None, {})
    place = Path(name).expanduser()
    if place.name == "model" and (place.parent / "plan.json").is_file() and not (place.parent / "adapter").exists():
        return replace(find_target(str(place.parent)), name=name)  # all weights of a run
    saved = find_saved(name)
    if saved.adapter is None and not saved.plan:
        resolve(saved.name, saved.revision, need="config")  # says what is wrong with the name
        return Target(name, saved, None, None, None, {})
    if saved.adapter is not None and not (saved.adapter / WEIGHTS).is_file():
        raise UserError(
            f"{WEIGHTS} is missing", where=str(saved.adapter), fix="let the run finish, or copy the adapter again"
        )
    owner = next((one for one in (place, place.parent) if (one / "plan.json").is_file()), None)
    plan = read_plan(owner / "plan.json") if owner else None
    run = read_json(owner / "run.json") if owner and (owner / "run.json").is_file() else {}
    final = owner is not None and (saved.adapter is None or saved.adapter.resolve() == (owner / "adapter").resolve())
    target = Target(name, saved, None, owner if final else None, plan, run)
    _check_base(target)
    return target


def read_plan(file: Path) -> Plan:
    """The plan in a run folder.

    Raises:
        UserError: it is damaged, or of another version.
    """
    written = read_json(file)
    sections = ("model", "quantization", "lora", "trainer", "data", "session")
    try:
        choices = {
            name: {key: Choice(one["value"], one["reason"]) for key, one in written[name].items()} for name in sections
        }
        return Plan(
            stage=written["stage"],
            family=written["family"],
            machine=written["machine"],
            memory=tuple(MemoryTerm(**term) for term in written.get("memory", ())),
            notes=tuple(written.get("notes", ())),
            refusal=written.get("refusal", ""),
            **choices,
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise UserError(
            f"this is no plan of a run ({exc!r})", where=str(file), fix="use the version that made the run"
        ) from exc


def _check_base(target: Target) -> None:
    """The base is the one that was trained on, as far as run.json tells."""
    recorded = (target.run.get("model") or {}).get("revision")
    if target.adapter is None or not isinstance(recorded, str):
        return
    assert target.saved is not None
    source = resolve(target.saved.name, target.saved.revision, need="weights")
    now = fingerprint(source.path) if recorded.startswith("content-") else source.revision
    if now is None:
        console.note(f"{source.name} cannot be compared with the base of the training, which was {recorded}")
    elif now != recorded:
        raise UserError(
            f"the base has changed since the training: it is {now}, and the adapter was trained on {recorded}",
            where=f"{target.name} on {source.name}",
            fix="put the base back as it was, or train again",
        )


# --- opened


@dataclass(slots=True)
class Opened:
    """A model that can be asked.

    Attributes:
        model: in evaluation mode; of a reward model its trunk. None once it was let go.
        before: the adapters of what the training began with, where the same weights can speak as that.
        head: of a reward model.
    """

    model: Any
    tokenizer: Any
    family: Family
    encoder: GemmaEncoder
    before: tuple[str, ...] | None = None
    head: RewardHead | None = None

    def reward(self) -> RewardModel:
        assert self.head is not None
        return RewardModel(self.model, self.head).eval()

    def let_go(self) -> None:
        """Free the weights: the next model need not fit beside these."""
        self.model = self.head = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def speaking(self, voice: Voice) -> Any:
        """A context in which the model is what it was before the training, or what it is now."""
        if voice == "base" and self.before is not None:
            return speaking_as(self.model, self.before)
        return nullcontext()


def open_target(target: Target, like: Plan | None = None) -> Opened:
    """The weights of `target`, with what its training began with beside them where that was an adapter.

    Args:
        like: the plan whose type and quantisation an untouched model is opened in, so that it can be compared with
            what was tuned in them; None for 16 bits as the machine has them, unquantised.

    Raises:
        UserError: see `models.saved`, `models.gguf_files`.
    """
    if target.saved is None:
        assert target.gguf is not None
        model, tokenizer, family = open_gguf(target.gguf, {})
        console.note(
            f"{target.gguf.name} is evaluated in transformers, which multiplies with its weights unpacked: what "
            "llama.cpp says differs by the rounding of its products"
        )
        model.requires_grad_(False)
        return Opened(model, tokenizer, family, GemmaEncoder(tokenizer, family))
    untouched = target.adapter is None and target.plan is None
    model, tokenizer, family = _open_like(target.saved, like) if untouched and like else open_saved(target.saved)
    encoder = GemmaEncoder(tokenizer, family)
    if target.adapter is None:
        if target.plan is None:
            model.requires_grad_(False)  # the head of a full fine-tune is scored as in its training: not frozen
        return Opened(model, tokenizer, family, encoder)
    head = None
    if target.is_reward:
        check_stats(read_stats(target.adapter), family, str(target.adapter))
        head = open_head(target.adapter, base_of(model).config.get_text_config().hidden_size)
        head = head.to(next(model.parameters()).device)
    before: tuple[str, ...] | None = tuple(reference_adapters(model))
    if start := start_of(target):
        before = (REFERENCE,) if _add_start(model, target, start) else None
    speak_as(model, [TRAINED])
    return Opened(model, tokenizer, family, encoder, before, head)


def _open_like(saved: Saved, plan: Plan) -> tuple[Any, Any, Family]:
    source = resolve(saved.name, saved.revision, need="config")
    family = family_of(read_json(source.path / "config.json"), where=source.name)
    dtype = plan.values("model")["dtype"]
    if dtype == "float16" and not on_gpu():
        dtype = dtype_of_machine(family)  # as `open_saved` does with what was tuned
    # The patterns of modules that are left alone are those of this model's own generation.
    how = {key: value for key, value in plan.values("quantization").items() if key != "llm_int8_skip_modules"}
    if "bnb_4bit_compute_dtype" in how:
        how["bnb_4bit_compute_dtype"] = dtype
    planned = plan.values("model")
    exponent = planned.get("residual_exponent", 0) if planned["dtype"] == dtype else 0
    chosen = {"dtype": dtype, "residual_exponent": residual_exponent_of(dtype, family, exponent)}
    model = load_base({**chosen, "name": saved.name, "revision": saved.revision}, how, family)
    return model, load_tokenizer(saved.name, saved.revision, family), family


def start_of(target: Target) -> str | None:
    """The adapter that the training began with, as the plan names it; None where it began with the plain base."""
    return (target.plan.values("session").get("adapter") or {}).get("start") if target.plan else None


def _add_start(model: Any, target: Target, start: str) -> bool:
    """Put the adapter that the training began with beside the trained one; a note where it is gone or has changed."""
    recorded = (target.run.get("identity") or {}).get("adapter.start")
    try:
        folder = adapter_folder(start)
    except UserError as exc:
        console.note(f"the training began with another adapter, which is not here: {exc.problems[0].what}")
        return False
    if recorded is not None and fingerprint(folder) != recorded:
        console.note(f"the training began with {start}, which has changed since then")
        return False
    add_saved(model, folder, REFERENCE)
    return True


def base_of_full_run(target: Target) -> Target | None:
    """What a full fine-tune began with, as a target; None for anything else."""
    if target.plan is None or target.adapter is not None or target.plan.lora:
        return None
    model = target.plan.values("model")
    recorded = (target.run.get("model") or {}).get("revision")
    revision = recorded if isinstance(recorded, str) and len(recorded) == 40 else model.get("revision")
    assert target.saved is not None
    saved = replace(target.saved, name=model["name"], revision=revision)
    return replace(target, name=model["name"], saved=saved, folder=None)


@contextmanager
def autocast_of(plan: Plan | None) -> Iterator[None]:
    """The autocast in which the training took its own held-out figures; none in most plans."""
    keywords = plan.values("trainer") if plan else {}
    kind = torch.bfloat16 if keywords.get("bf16") else torch.float16 if keywords.get("fp16") else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, kind) if kind is not None else nullcontext():
        yield
