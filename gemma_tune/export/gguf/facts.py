"""config.json -> what llama.cpp has to know of the model; and a refusal where it would compute something else.

Some facts have no key in the file: llama.cpp derives them (`families.Gguf`). A checkpoint that differs there would be
read without a word and answer wrongly, so each of them is compared here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES, Family, Gguf
from gemma_tune.models.reference import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True, slots=True)
class Decoder:
    """The text decoder of a checkpoint, as transformers understands its config.json.

    Attributes:
        facts: `families.Gguf` of its generation.
        text: the text config, every default filled in.
        tied: whether the head is the embedding.
    """

    facts: Gguf
    text: Any
    tied: bool

    @property
    def layers(self) -> int:
        return int(self.text.num_hidden_layers)

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(self.text.vocab_size)


def gguf_facts(family: Family) -> Gguf:
    """How llama.cpp reads this generation.

    Raises:
        UserError: no file of this generation was proved against transformers.
    """
    if family.gguf is None:
        proved = sorted({row.label for row in FAMILIES.values() if row.gguf and row.text_model_type is None})
        raise UserError(
            f"a GGUF file of {family.label} has not been proved equal to the model, so none is written",
            where="gguf",
            fix=f"export it as safetensors and convert it with llama.cpp; proved are {', '.join(proved)}",
        )
    return family.gguf


def read_decoder(model: Path, family: Family) -> Decoder:
    """The decoder that config.json in `model` describes.

    Raises:
        UserError: llama.cpp would compute something else, or the generation was not proved.
    """
    from transformers import AutoConfig

    facts = gguf_facts(family)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    decoder = Decoder(facts, config.get_text_config(), bool(config.tie_word_embeddings))
    _check(decoder, family, str(model / "config.json"))
    return decoder


def _check(decoder: Decoder, family: Family, where: str) -> None:
    text, facts = decoder.text, decoder.facts

    def refuse(key: str, value: Any, expected: Any) -> None:
        raise UserError(
            f"llama.cpp takes {key} to be {expected} in this architecture, not {value}",
            where=where,
            fix="export it as safetensors: no GGUF file can say this",
        )

    # transformers 5: `hidden_activation` of Gemma 2 and 3, `hidden_act` of Gemma 1.
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if activation != "gelu_pytorch_tanh":
        refuse("hidden_activation", activation, "gelu_pytorch_tanh")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if getattr(text, key, None):
            refuse(key, getattr(text, key), False)
    per_head = decoder.layers != facts.narrow_scale_layers
    width = text.head_dim if per_head else text.hidden_size // text.num_attention_heads
    scale = getattr(text, "query_pre_attn_scalar", text.head_dim)
    if not math.isclose(scale, width):
        refuse("query_pre_attn_scalar", scale, width)
    caps = {"attn_logit_softcapping": family.attention_softcap, "final_logit_softcapping": family.final_softcap}
    for key, usual in caps.items():
        if usual is not None and not getattr(text, key):  # a key that is absent means the usual one there
            refuse(key, getattr(text, key), usual)
    if getattr(text, "attn_logit_softcapping", None) and family.attention_softcap is None:
        refuse("attn_logit_softcapping", text.attn_logit_softcapping, "absent")
    if facts.period is not None and len(set(text.layer_types)) == 1:
        # It ends the whole process there: GGML_ASSERT(hparams.is_swa_any()).
        refuse("the kinds of layers", text.layer_types[0], "sliding and full attention")
    for kind, rope in _ropes(text).items():
        if rope["rope_type"] != "default" and (rope["rope_type"], kind) != ("linear", "full_attention"):
            refuse(f"the rope_type of {kind}", rope["rope_type"], "default")


def _ropes(text: Any) -> dict[str, Mapping[str, Any]]:
    """Kind of layer -> its RoPE. Gemma 1 and 2 have one for all."""
    ropes = text.rope_parameters
    return dict(ropes) if "full_attention" in ropes else {"full_attention": ropes}


def add_facts(writer: GGUFWriter, decoder: Decoder) -> None:
    """Write the keys `<architecture>.*`."""
    import gguf

    text = decoder.text
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(decoder.layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    ropes = _ropes(text)
    whole = ropes["full_attention"]
    writer.add_rope_freq_base(whole["rope_theta"])
    if whole["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(whole["factor"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if decoder.facts.period is not None:
        writer.add_sliding_window(text.sliding_window)
        sliding = [kind == "sliding_attention" for kind in text.layer_types]
        # Published sizes leave the pattern to llama.cpp, whose older versions do not read it.
        if sliding != [(layer + 1) % decoder.facts.period != 0 for layer in range(decoder.layers)]:
            writer.add_sliding_window_pattern(sliding)
    if cap := getattr(text, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(text, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
