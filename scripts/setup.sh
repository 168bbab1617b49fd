#!/usr/bin/env bash
# Builds the virtual environment that `make quickstart` and `make test` use: scripts/setup.sh [FOLDER]
#   PYTHON       interpreter to build it with (default python3; 3.11 or newer)
#   TORCH_INDEX  package index to take torch from, e.g. PyTorch's CPU index (default: pip's own configuration)
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv}"
python="${PYTHON:-python3}"

"$python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"gemma-tune needs Python 3.11 or newer; this is {sys.version.split()[0]}. Set PYTHON=python3.11 and try again.")
PY

rm -f "$venv/.ready"
# Without pip it is half a venv: Debian leaves one behind where its package python3-venv is missing.
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# torch goes in first and by itself: resolved together with the rest, pip would take the newest build and its CUDA
# packages even on a machine without a GPU. A torch that is already in the environment stays.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "Installing torch ..."
    "${pip[@]}" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
fi
echo "Installing gemma-tune and what it needs ..."
"${pip[@]}" install --quiet -c constraints.txt -e ".[quickstart,dev]"
touch "$venv/.ready"
