#!/usr/bin/env bash
# On a machine with an MI300X or MI325X: what docs/mi300x.md can't know without one, in one file to send back.
#
#   bash docs/mi300x.sh [FOLDER]     FOLDER is created (default: epfuse-mi300x); the file is FOLDER.tar.gz
#
# Needs `epfuse` and the `python3` that it is installed for on PATH: .venv/bin of `make test PYTHON=... KEEP_TORCH=1`.
# Exits with 0 if everything passed, 1 if a step failed (the file is written all the same), 2 without such a GPU.
set -uo pipefail

folder=${1:-epfuse-mi300x}

if ! python3 - <<'PYTHON'; then
import sys
import torch
from epfuse import Target, target_of

if not torch.cuda.is_available() or torch.version.hip is None:
    sys.exit("no ROCm GPU: torch " + torch.__version__)
if target_of(torch.device("cuda", 0)) is not Target.GFX942:
    sys.exit("GPU 0 is no gfx942")
PYTHON
    echo "mi300x.sh: this needs an MI300X or MI325X" >&2
    exit 2
fi

mkdir -p "$folder"
: > "$folder/steps.txt"
failed=0

# step NAME COMMAND...: NAME.json is what the command prints, NAME.log its stderr, steps.txt its exit code and seconds
step() {
    local name=$1 start=$SECONDS code=0
    shift
    echo "mi300x.sh: $*" >&2
    "$@" > "$folder/$name.json" 2> "$folder/$name.log" || code=$?
    printf '%s\t%d\t%d s\t%s\n' "$name" "$code" $((SECONDS - start)) "$*" >> "$folder/steps.txt"
    [ "$code" -eq 0 ] || failed=1
}

{
    uname -srm
    python3 -m pip list 2> /dev/null | grep -iE '^(torch|triton|pytorch-triton|epfuse) ' || true
    amd-smi version 2> /dev/null || rocm-smi --version 2> /dev/null || true
    rocm-smi --showproductname --showclocks --showpower 2> /dev/null || true
    git rev-parse HEAD 2> /dev/null || true
} > "$folder/machine.txt"

step verify epfuse verify --json
step verify-minimax-m3 epfuse verify --shape minimax-m3 --json
step aot epfuse aot --target gfx942 --json
if epfuse bench --help > /dev/null 2>&1; then
    step bench epfuse bench --json
else
    printf 'bench\t-\t-\tthis epfuse has no bench\n' >> "$folder/steps.txt"
fi

tar -czf "$folder.tar.gz" "$folder"
cat "$folder/steps.txt" >&2
echo "$folder.tar.gz"
exit "$failed"
