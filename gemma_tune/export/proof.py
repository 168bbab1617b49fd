"""What was written, held against base + adapter, in fp32.

Three models speak over the same prompts, each with the weights of one source and nothing else loaded: the base with the
adapter as PEFT applies it (the reference), the merged weights before they are rounded to the type of the file, and the
file. The first difference is arithmetic, and must be nothing; the second is what rounding to 16 bits costs.

A layer's weights are in memory only while it works (accelerate's hooks), so that a model of any size can be proved.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.export.merge import Base, empty_model, trained_config
from gemma_tune.export.names import core_name
from gemma_tune.export.subject import Subject
from gemma_tune.export.updates import EMBEDDING, HEAD
from gemma_tune.export.weights import CheckpointFiles, Weights
from gemma_tune.gemma.chat import Encoder, render_prompt
from gemma_tune.gemma.conversation import Conversation, Message
from gemma_tune.gemma.families import Family
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import CONFIG, add_saved, open_adapter
from gemma_tune.models.reference import quiet_transformers
from gemma_tune.models.remedies import is_tower
from gemma_tune.models.roles import TRAINED, belongs, speak_as, tuner_layers

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I boil an egg? Give me three steps.",
    "Explain to a child why the sky is blue.",
    "def fibonacci(n):",
    "Übersetze ins Englische: Der frühe Vogel fängt den Wurm.",
    "用一句话介绍你自己。",
    "List five animals that live in Africa.",
)
"""Every proof reads these, so that figures of two exports can be compared."""

ARITHMETIC = 1e-3
"""Largest difference of logits that fp32 may make, where logits are tens; larger logits round more: see `limit`."""
ROUNDING = 0.01
"""Mean KL in nats a token that rounding the merged weights to 16 bits may cost."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one model's next-token distributions are from the reference's.

    Attributes:
        largest_logit: largest absolute difference of two logits.
        scale: largest absolute logit of the reference.
        mean_kl, largest_kl: KL(reference || model) over the positions, in nats.
        same_choice: share of positions where both have the same first choice.
        positions: how many were compared.
    """

    largest_logit: float
    scale: float
    mean_kl: float
    largest_kl: float
    same_choice: float
    positions: int

    @property
    def limit(self) -> float:
        """What `largest_logit` may be where only the order of fp32 operations differs."""
        return max(ARITHMETIC, 1e-5 * self.scale)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prompt_rows(family: Family, encoder: Encoder) -> list[list[int]]:
    """`PROMPTS` as token ids, each with its generation prompt."""
    return [render_prompt(Conversation((Message("user", text),)), family, encoder) for text in PROMPTS]


def compare(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """[T, V] logits of each row of two models -> their differences over all positions."""
    import torch

    largest = scale = total = worst = 0.0
    same = positions = 0
    for ours, theirs in zip(reference, other, strict=True):
        apart = (ours - theirs).abs().max().item()
        largest = apart if apart != apart else max(largest, apart)
        scale = max(scale, ours.abs().max().item())
        for one, two in zip(ours, theirs, strict=True):  # a position at a time: the vocabulary has 262,144 words
            p, q = one.double().log_softmax(-1), two.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum().item()
            total, worst = total + kl, kl if kl != kl else max(worst, kl)  # NaN stays
            same += int(torch.equal(one.argmax(), two.argmax()))
            positions += 1
    return Difference(largest, scale, total / positions, worst, same / positions, positions)


def logits_of(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> list[torch.Tensor]:
    """fp32 logits of each row, [T, V], from one forward pass over all rows; padding stands on the right."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.inference_mode():
        logits = _text_logits(model, ids, mask)
    return [logits[index, : len(row)].float() for index, row in enumerate(rows)]


def _text_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, T, V]. Of a multimodal class the decoder and the head are called by themselves.

    Gemma 4's outer forward takes a row of the embedding without calling it, which a layer that is not there cannot give
    (transformers 5.23, modeling_gemma4.py, pad_embedding).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.get_text_config() is base.config:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits = base.lm_head(base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
    cap = base.config.get_text_config().final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


@dataclass(frozen=True, slots=True)
class Proof:
    """What a merge was found to be.

    Attributes:
        arithmetic: merged weights in fp32 against base + adapter.
        file: what was written, which has the type of the file, against base + adapter.
        base: the mode, `original` or `dequantized`.
        dtype: the type of the file.
    """

    arithmetic: Difference
    file: Difference
    base: Base
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"limit": self.arithmetic.limit, "rounding_limit": ROUNDING, "prompts": len(PROMPTS)}


def prove(
    subject: Subject, base: Base, merged: Weights, written: Weights | None, rows: Sequence[Sequence[int]]
) -> Proof:
    """Compare the weights of a merge, and the file made of them, with the adapter on its base.

    Args:
        subject: base and adapters.
        base: what was merged into.
        merged: the weights before they were rounded to the type of the file.
        written: what was written; None where that is no safetensors, and is opened by others.
        rows: token ids, e.g. of `prompt_rows`.
    """
    config = trained_config(subject)
    pad = subject.family.pad_id
    reference = logits_of(reference_model(subject, base), rows, pad)
    arithmetic = compare(reference, logits_of(lazy_model(config, merged, subject.family), rows, pad))
    if written is None:
        return Proof(arithmetic, arithmetic, base, "float32")
    types = {str(written.dtype(name)) for name in written.names() if written.dtype(name).is_floating_point}
    dtype = ", ".join(sorted(one.removeprefix("torch.") for one in types))
    return Proof(
        arithmetic, compare(reference, logits_of(lazy_model(config, written, subject.family), rows, pad)), base, dtype
    )


def check_proof(proof: Proof, where: str) -> None:
    """Refuse a merge that is not its adapter.

    Raises:
        GemmaTuneError: the arithmetic differs.
        UserError: rounding to the type of the file costs too much.
    """
    for found in (proof.arithmetic, proof.file) if proof.dtype == "float32" else (proof.arithmetic,):
        if found.largest_logit <= found.limit:
            continue  # NaN is not
        raise GemmaTuneError(
            f"the merged model is not the adapter: logits differ by up to {found.largest_logit:.2g} in fp32 "
            f"(allowed: {found.limit:.1g}), KL {found.mean_kl:.2g} nats a token; nothing was written",
            where=where,
            fix="report it, with adapter_config.json: this is a bug, or PEFT has changed",
        )
    if not proof.file.mean_kl <= ROUNDING:
        raise UserError(
            f"rounding the merged weights to {proof.dtype} changes what the model says by {proof.file.mean_kl:.2g} "
            f"nats a token (allowed: {ROUNDING}); nothing was written",
            where=where,
            fix="use --dtype float32",
        )


# --- the reference


def reference_model(subject: Subject, base: Base) -> Any:
    """Base + adapters as PEFT applies them, in fp32; a base that is merged into in 4 bits is loaded in 4 bits."""
    if base == "dequantized":
        return loaded_reference(subject, base)
    from peft import PeftModel
    from peft.utils import load_peft_weights

    files = CheckpointFiles(subject.source.path)
    with quiet_transformers():
        model: Any = empty_model(_in_fp32(trained_config(subject), subject.family)).eval()
    plain = _attended(model, files)
    saved: dict[str, Mapping[str, torch.Tensor]] = {}
    for number, one in enumerate(subject.adapters):
        name, folder = _name_of(number), str(one.folder)
        saved[name] = load_peft_weights(folder, device="cpu")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what PEFT would warn of is an error below
                if number == 0:
                    model = PeftModel.from_pretrained(model, folder, adapter_name=name, low_cpu_mem_usage=True)
                else:
                    model.load_adapter(folder, name, low_cpu_mem_usage=True)
        except (ValueError, TypeError, RuntimeError, KeyError) as exc:
            raise UserError(
                f"PEFT cannot put it on its base: {(str(exc).splitlines() or [type(exc).__name__])[0][:200]}",
                where=folder,
                fix="its config and its tensors belong to different adapters: copy it again",
            ) from exc
        _check_pairs(model, name, saved[name], folder)
    _combine(model, subject)
    return _hook(model.eval(), _WithAdapters(plain, saved), subject.family)


def _check_pairs(model: Any, name: str, saved: Mapping[str, torch.Tensor], folder: str) -> None:
    """What PEFT makes of the config is what the file holds: neither more nor less."""
    wanted = {_saved_name(key, name, saved) for key, _ in model.named_parameters() if belongs(key, name)}
    if odd := sorted(wanted ^ saved.keys()):
        raise UserError(
            f"{len(odd)} tensors of the adapter do not pair with its {CONFIG}, e.g. {odd[0]}",
            where=folder,
            fix="copy the adapter again; names of another class or prefix match nothing",
        )


def _saved_name(parameter: str, adapter: str, saved: Mapping[str, torch.Tensor]) -> str:
    """What PEFT calls a parameter of an adapter in its file (peft 0.21, utils/save_and_load.py)."""
    short = parameter.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", ".")
    return short if short in saved else short.removesuffix(".weight") if "magnitude" in short else short


def _name_of(number: int) -> str:
    return TRAINED if number == 0 else f"adapter_{number}"


def _combine(model: Any, subject: Subject) -> None:
    """Let all adapters speak together, each with its weight."""
    if not subject.adapters:
        return
    names = [_name_of(number) for number in range(len(subject.adapters))]
    for layer in tuner_layers(model):
        scaling: dict[str, float] = getattr(layer, "scaling", {})
        for name, one in zip(names, subject.adapters, strict=True):
            if name in scaling:
                scaling[name] *= one.weight
    if len(names) > 1:
        speak_as(model, names)


def loaded_reference(subject: Subject, base: Base) -> Any:
    """The same with all weights in memory, able to generate.

    In 4 bits it is the model of the training: packed weights, computed with in fp32, everything else in fp32.
    """
    quantization: dict[str, Any] = {}
    chosen = {"text_only": subject.trained is not subject.family, "dtype": "float32"}
    if base == "dequantized":
        quantization = subject.planned("quantization") | {"bnb_4bit_compute_dtype": "float32"}
        chosen["dtype"] = subject.planned("model")["dtype"]  # the type that the weights had when they were packed
    chosen |= {"name": subject.source.name, "revision": subject.hub_revision()}
    model: Any = load_base(chosen, quantization, subject.trained)
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    # Constants such as the embedding's scale, which a model that is loaded in 16 bits has rounded.
    fresh = dict(empty_model(_in_fp32(trained_config(subject), subject.family)).named_buffers())
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = fresh[name].to(buffer.device) if name not in model.state_dict() else buffer.float()
    for number, one in enumerate(subject.adapters):
        if number == 0:
            model = open_adapter(model, one.folder)
        else:
            add_saved(model, one.folder, _name_of(number))
    _combine(model, subject)
    return model.eval()


# --- models whose weights come when they are needed


def lazy_model(config: Any, weights: Weights, family: Family) -> Any:
    """The text decoder of a config with `weights`, in fp32, of which no more than a layer is in memory.

    Args:
        config: a transformers config; of a multimodal one the text decoder is taken.
        weights: names of any class.
        family: the generation.
    """
    with quiet_transformers():
        model = empty_model(_in_fp32(config.get_text_config(), family)).eval()
    return _hook(model, _attended(model, weights), family)


def _hook(model: Any, served: Mapping[str, torch.Tensor], family: Family) -> Any:
    """The model, each of whose layers takes its weights from `served` when it is called and drops them afterwards."""
    import torch
    from accelerate.hooks import attach_align_device_hook

    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=served,
        preload_module_classes=[family.decoder_layer],
    )
    return model


def _in_fp32(config: Any, family: Family) -> Any:
    for level in {id(one): one for one in (config, config.get_text_config())}.values():
        level._attn_implementation = family.attention[0]
        level.dtype = "float32"
    return config


def _attended(model: Any, weights: Weights) -> _Lazily:
    """The weights of an empty model; buffers that are saved with them (Gemma 4's layer scalars) are filled in now."""
    served = _Lazily(weights)
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and not is_tower(name):
            buffer.data = served[name].to(buffer.dtype)
    return served


class _Lazily(Mapping[str, "torch.Tensor"]):
    """Names of a model's parameters -> tensors in fp32, read when they are asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._known = {core_name(name): name for name in weights.names()}

    def __getitem__(self, name: str) -> torch.Tensor:
        core = core_name(name)
        if core == HEAD and core not in self._known:
            core = EMBEDDING  # a tied head
        return self._weights.read(self._known[core]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class _WithAdapters(Mapping[str, "torch.Tensor"]):
    """The same for a model that PEFT has put adapters on.

    PEFT moves what it loads to where the base is, which here is nowhere. So it makes the layers and decides what each
    computes, and their values come from the file, under the names that PEFT saves them by (peft 0.21,
    utils/save_and_load.py).
    """

    def __init__(self, base: Mapping[str, torch.Tensor], saved: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._base, self._saved = base, saved

    def __getitem__(self, name: str) -> torch.Tensor:
        for adapter, tensors in self._saved.items():
            if belongs(name, adapter):
                return tensors[_saved_name(name, adapter, tensors)].float()
        return self._base[name.replace(".base_layer.", ".").replace(".original_module.", ".")]

    def __iter__(self) -> Iterator[str]:
        return (name for tensors in self._saved.values() for name in tensors)

    def __len__(self) -> int:
        return sum(map(len, self._saved.values()))
