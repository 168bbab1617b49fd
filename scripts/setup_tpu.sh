#!/usr/bin/env bash
# Builds the environment for TPUs: scripts/setup_tpu.sh [FOLDER]
#   PYTHON  interpreter to build it with (default python3; 3.11 or newer)
#   LIBTPU  any value: install libtpu too, which a TPU needs, and `check --machine v5e-8` anywhere
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-tpu}"
python="${PYTHON:-python3}"

rm -f "$venv/.ready"
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

echo "Installing JAX, tunix and qwix ..."
names="$("$venv/bin/python" - <<'PY'
import tomllib
with open("pyproject.toml", "rb") as file:
    print("\n".join(tomllib.load(file)["dependency-groups"]["tpu"]))
PY
)"
mapfile -t wanted <<<"$names"
"${pip[@]}" -c constraints-tpu.txt "${wanted[@]}" ${LIBTPU:+"jax[tpu]"}
# Without what they ask for, which is torch and another transformers: of gemma-tune the parts without torch are used, of
# TRL the chat templates.
"${pip[@]}" --no-deps -c constraints-tpu.txt "trl>=1.16,<1.17"
"${pip[@]}" --no-deps -e .
touch "$venv/.ready"
