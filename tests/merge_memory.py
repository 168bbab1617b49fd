"""Merge a model of many files in a process of its own and report the memory it took.

python -m tests.merge_memory RUN OUT    prints {"peak": bytes, "total": bytes, "shard": bytes, "code": exit code}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LAYERS = 28
WIDTH, INNER = 1024, 12_288


def make_large(folder: Path, tokenizer: Path) -> Path:
    """A Gemma 3 (text) of 28 layers and 2.3 GB in bf16, a file a layer. All layers hold the same numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma3TextConfig

    folder.mkdir()
    config = Gemma3TextConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        dtype="bfloat16",
        architectures=["Gemma3ForCausalLM"],
    )
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    shapes = {
        "self_attn.q_proj": (1024, WIDTH),
        "self_attn.k_proj": (256, WIDTH),
        "self_attn.v_proj": (256, WIDTH),
        "self_attn.o_proj": (WIDTH, 1024),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    layer = {f"{name}.weight": (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    layer |= {f"{name}.weight": torch.zeros(WIDTH, dtype=torch.bfloat16) for name in norms}
    layer |= {f"self_attn.{name}_norm.weight": torch.zeros(256, dtype=torch.bfloat16) for name in "qk"}
    ends = {
        "model.embed_tokens.weight": (torch.randn(1024, WIDTH) * 0.02).bfloat16(),
        "model.norm.weight": torch.zeros(WIDTH, dtype=torch.bfloat16),
    }
    index: dict[str, str] = {}
    for number in range(LAYERS + 1):
        tensors = ends if number == LAYERS else {f"model.layers.{number}.{name}": one for name, one in layer.items()}
        name = f"model-{number + 1:05}-of-{LAYERS + 1:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def make_adapter(base: Path, folder: Path, rank: int = 4) -> None:
    """A LoRA on every MLP, which moves every answer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tensors = {}
    for number in range(LAYERS):
        for name, (rows, columns) in {
            "gate": (INNER, WIDTH),
            "up": (INNER, WIDTH),
            "down": (WIDTH, INNER),
        }.items():
            place = f"base_model.model.model.layers.{number}.mlp.{name}_proj"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def main(run: str, out: str) -> int:
    from gemma_tune.cli import main as gemma_tune
    from gemma_tune.train.provenance import peak_memory

    code = gemma_tune(["merge", run, "--out", out])
    sizes = [file.stat().st_size for file in Path(out).glob("*.safetensors")]
    peak = peak_memory()["rss"]
    print(json.dumps({"peak": peak, "total": sum(sizes), "shard": max(sizes, default=0), "code": code}))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
