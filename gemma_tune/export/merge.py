"""Base + change -> a checkpoint in the base's own class, names and files, in bounded memory.

The base's layout is what servers were made for, so it is kept to the name: a multimodal Gemma keeps its towers and
prefixes, a tied head stays out of the files (vllm#15836, #3323). One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_tune.errors import AccessError, UserError
from gemma_tune.export.names import core_name
from gemma_tune.export.subject import Subject
from gemma_tune.export.updates import EMBEDDING, HEAD, Updates
from gemma_tune.export.weights import INDEX, CheckpointFiles, Weights
from gemma_tune.gemma.families import Family
from gemma_tune.models.reference import ModelSource, resolve
from gemma_tune.plan.facts import read_json

if TYPE_CHECKING:
    import torch

Base = Literal["original", "dequantized"]
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_TYPES |= {"int64": "I64", "int32": "I32", "bool": "BOOL"}


class Merged:
    """The weights of a base with adapters in them (`export.weights.Weights`).

    What an adapter changes is read in fp32; everything else as it is stored. Where an adapter has trained the embedding
    or the head apart from the other, `tied` is False, and the head is a tensor of its own.

    Args:
        base: weights to merge into.
        updates: from the adapters.
        tied: whether the base's head is its embedding.
    """

    def __init__(self, base: Weights, updates: Updates, tied: bool) -> None:
        self._base, self._updates = base, updates
        self._names = [name for name in base.names() if not (tied and core_name(name) == HEAD)]
        self.tied = tied
        if tied and updates.replaced & {EMBEDDING, HEAD} and not self._same_ends():
            self.tied = False
            embedding = next(name for name in self._names if core_name(name) == EMBEDDING)
            self._embedding = embedding
            # Where names of the decoder begin with `language_model.`, so does the head's (before transformers 4.52).
            self._head = ("language_model." if embedding.startswith("language_model.") else "") + HEAD
            self._names.insert(self._names.index(embedding) + 1, self._head)
        else:
            self._head = ""

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._origin(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(self._origin(name))

    def read(self, name: str) -> torch.Tensor:
        return self._updates.apply(core_name(name), self._base.read(self._origin(name)))

    def moved(self) -> bool:
        """Whether the adapters change anything."""
        return self._updates.moved()

    def beside(self, name: str) -> str:
        """The base's tensor whose file `name` belongs into."""
        return self._origin(name)

    def _origin(self, name: str) -> str:
        return self._embedding if self._head and name == self._head else name

    def _same_ends(self) -> bool:
        """Whether embedding and head, saved whole, are the same tensor: one that was trained tied."""
        adapter = self._updates.adapters[0]
        if adapter.config.get("ensure_weight_tying"):
            return True
        if not {EMBEDDING, HEAD} <= self._updates.replaced:
            return False
        return bool((adapter.whole(EMBEDDING) == adapter.whole(HEAD)).all())


class Dequantized:
    """The weights of a base as 4-bit training holds them: quantised by bitsandbytes and dequantised again, to fp32.

    Args:
        base: the 16-bit weights.
        quantization: `Plan.values("quantization")`.
        dtype: the type that the model was loaded in.
        layers: core names of the weights that are quantised.
    """

    def __init__(self, base: Weights, quantization: Mapping[str, Any], dtype: str, layers: frozenset[str]) -> None:
        self._base, self._layers, self._dtype = base, layers, dtype
        self._kind = quantization.get("bnb_4bit_quant_type", "fp4")
        self._double = bool(quantization.get("bnb_4bit_use_double_quant"))
        self._storage = quantization.get("bnb_4bit_quant_storage") or "uint8"

    def names(self) -> Sequence[str]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        import torch

        weight = self._base.read(name)
        if core_name(name) not in self._layers:
            return weight
        from gemma_tune.models import remedies

        remedies.import_bitsandbytes()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        packed, state = quantize_4bit(
            weight.to(device, getattr(torch, self._dtype)),
            compress_statistics=self._double,
            quant_type=self._kind,
            quant_storage=getattr(torch, self._storage),
        )
        # Unrounded: with 16-bit activations bitsandbytes rounds these values to 16 bits inside its product, which is
        # the precision of that product and no property of the base.
        state.dtype = torch.float32
        return dequantize_4bit(packed, state).reshape(weight.shape).cpu()


def quantised_layers(config: Any, family: Family, quantization: Mapping[str, Any]) -> frozenset[str]:
    """Core names of the weights that loading with `quantization` packs, found on a model without data.

    Args:
        config: of the class that was trained (a transformers config).
        family: whose list of modules stays in 16 bits.
        quantization: keywords of BitsAndBytesConfig.
    """
    from gemma_tune.models import remedies

    remedies.import_bitsandbytes()
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    skipped = list(family.skip_quantization)
    model = empty_model(config)
    keywords = BitsAndBytesConfig(**{"llm_int8_skip_modules": skipped, **quantization})
    model = replace_with_bnb_linear(
        model, modules_to_not_convert=keywords.llm_int8_skip_modules, quantization_config=keywords
    )
    return frozenset(
        f"{core_name(name)}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)
    )


def empty_model(config: Any) -> Any:
    """The model of a config without the memory of its parameters; buffers, such as rotary frequencies, are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


def merged_weights(subject: Subject, base: Base) -> tuple[CheckpointFiles, Merged]:
    """The files of the base, and its weights with the adapters of `subject` in them.

    Raises:
        UserError: an adapter does not fit, or `dequantized` is asked for and the run was not quantised.
    """
    files = CheckpointFiles(subject.source.path)
    tied = is_tied(read_json(subject.source.path / "config.json"))
    known = _check_complete(files, trained_config(subject), tied)
    weights: Weights = files
    if base == "dequantized":
        quantization = subject.planned("quantization")
        if not quantization.get("load_in_4bit"):
            raise UserError(
                "no 4-bit base is known: the run was not quantised, or its plan.json is gone",
                where=subject.target,
                fix="use --base original",
            )
        layers = quantised_layers(trained_config(subject), subject.trained, quantization)
        weights = Dequantized(files, quantization, subject.planned("model")["dtype"], layers)
    updates = Updates(subject.adapters, weights)
    if odd := sorted((updates.updated | updates.replaced) - known - {HEAD}):
        raise UserError(
            f"the adapter changes {odd[0]}, which this model does not use",
            where=subject.target,
            fix="use the base that it was trained on",
        )
    return files, Merged(weights, updates, tied)


def _check_complete(files: CheckpointFiles, config: Any, tied: bool) -> frozenset[str]:
    """Core names of what the text decoder of a config is made of.

    Raises:
        UserError: the files lack some of it.
    """
    model = empty_model(config.get_text_config())
    known = frozenset(map(core_name, model.state_dict())) - ({HEAD} if tied else set())
    missing = sorted(known - set(map(core_name, files.names())))
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing in the weights and would be random, e.g. {missing[0]}",
            where=str(files.folder),
            fix="fetch the complete model",
        )
    return known


def trained_config(subject: Subject) -> Any:
    """The config of the class that was trained."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(subject.source.path), local_files_only=True, trust_remote_code=False)
    return config.get_text_config() if subject.trained is not subject.family else config


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding. Every published Gemma's is; config.json names it only where it is not."""
    inner = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))


def write_checkpoint(weights: Merged, files: CheckpointFiles, folder: Path, dtype: str | None = None) -> int:
    """Write `weights` as files of the same names as the base's, tensor by tensor.

    Args:
        weights: what is written.
        files: the base's, whose division into files is kept.
        folder: an empty folder.
        dtype: `bfloat16`, `float16` or `float32` for all floating-point tensors; None keeps the base's.

    Returns:
        Bytes of all tensors.

    Raises:
        UserError: a merged weight does not fit into the type (fp16 ends at 65,504).
    """
    index: dict[str, str] = {}
    total = 0
    for shard in files.shards():
        inside = set(files.names_in(shard))
        names = [name for name in weights.names() if weights.beside(name) in inside]
        if not names:
            continue
        total += _write_file(weights, names, folder / shard, dtype)
        index |= dict.fromkeys(names, shard)
    if len(files.shards()) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(weights: Weights, names: Sequence[str], file: Path, dtype: str | None) -> int:
    """One safetensors file (github.com/huggingface/safetensors, "Format"), without holding more than one tensor.

    The library's own `save_file` wants all tensors of a file at once.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    types: dict[str, torch.dtype] = {}
    place = 0
    for name in names:
        types[name] = _written_type(weights, name, dtype)
        size = types[name].itemsize * math.prod(weights.shape(name))
        header[name] = {
            "dtype": _TYPES[str(types[name]).removeprefix("torch.")],
            "shape": list(weights.shape(name)),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            exact = weights.read(name)
            tensor = exact.to(types[name]).contiguous()
            _check_rounded(exact, tensor, name, file)
            handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return place


def _written_type(weights: Weights, name: str, dtype: str | None) -> torch.dtype:
    """The type that a tensor gets in the file: `dtype` where it holds floating-point numbers and one is asked for."""
    import torch

    stored = weights.dtype(name)
    return getattr(torch, dtype) if dtype and stored.is_floating_point else stored


def _check_rounded(exact: torch.Tensor, tensor: torch.Tensor, name: str, file: Path) -> None:
    """Refuse NaN, and what became infinite; towers hold infinite limits of their own (Gemma 4's clipped layers)."""
    import torch

    if tensor.is_floating_point() and (tensor.isnan().any() or not torch.equal(tensor.isinf(), exact.isinf())):
        raise UserError(
            f"{name} is not finite as {str(tensor.dtype).removeprefix('torch.')}",
            where=file.name,
            fix="the base or the adapter is damaged; where only --dtype float16 fails, use bfloat16",
        )


_COPIED = ("preprocessor_config.json", "processor_config.json")


def write_surroundings(subject: Subject, weights: Merged, folder: Path, dtype: str | None) -> None:
    """config.json, generation_config.json with all stop ids, tokenizer with the official template, processors."""
    config = dict(read_json(subject.source.path / "config.json"))
    if dtype:
        for level in _levels(config):
            for key in ("dtype", "torch_dtype"):
                if key in level or (level is config and key == "dtype" and "torch_dtype" not in config):
                    level[key] = dtype
    if not weights.tied:
        for level in _levels(config):
            level["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_generation_config(subject, folder)
    write_tokenizer(subject, folder)
    for name in _COPIED:
        if (subject.source.path / name).is_file():
            shutil.copyfile(subject.source.path / name, folder / name)


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    if isinstance(config.get("text_config"), dict):
        yield config["text_config"]


def write_generation_config(subject: Subject, folder: Path) -> None:
    """The base's generation_config.json, with every stop id of the generation: a base names only <eos>."""
    file = subject.source.path / "generation_config.json"
    config = dict(read_json(file)) if file.is_file() else {}
    family = subject.family
    config |= {"eos_token_id": list(family.stop_ids), "pad_token_id": family.pad_id, "bos_token_id": family.bos_id}
    config.pop("use_cache", None)
    (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(subject: Subject, folder: Path) -> None:
    """The tokenizer that the run used, with the official template."""
    from gemma_tune.models.tokenizer import open_tokenizer

    source = tokenizer_source(subject)
    open_tokenizer(source, subject.family).save_pretrained(folder)
    if (source.path / "tokenizer.model").is_file() and not (folder / "tokenizer.model").is_file():
        shutil.copyfile(source.path / "tokenizer.model", folder / "tokenizer.model")


def tokenizer_source(subject: Subject) -> ModelSource:
    """Where the tokenizer of the training lies: with the adapter, where the recipe says, or with the base."""
    places = [one.folder for one in subject.adapters]
    if subject.run_folder is not None:
        places.append(subject.run_folder / "adapter")
    for place in places:
        if (place / "tokenizer.json").is_file():
            return ModelSource(str(place), place, None)
    other = subject.planned("model").get("tokenizer")
    return resolve(other, need="tokenizer") if other else subject.source


def check_room(weights: Weights, folder: Path, dtype: str | None) -> None:
    """Refuse before the work what the disk cannot hold.

    Raises:
        AccessError: fewer bytes are free than the tensors take.
    """
    needed = sum(
        _written_type(weights, name, dtype).itemsize * math.prod(weights.shape(name)) for name in weights.names()
    )
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise AccessError(
            f"the result takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            where=str(place),
            fix="choose a larger disk with --out",
        )
