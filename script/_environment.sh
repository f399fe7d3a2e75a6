# Sourced by the other scripts: a virtual environment in .venv with Headway installed from this tree.
#   ensure_environment EXTRA     installs headway[EXTRA] unless this tree's requirements are there already
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PIP_DISABLE_PIP_VERSION_CHECK=1

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
      echo "$name"
      return
    fi
  done
  echo "Headway needs Python 3.10 or newer; 'python3' is older or missing." >&2
  return 1
}

ensure_environment() {
  local extra=$1 stamp wanted python
  wanted=$(cat pyproject.toml constraints*.txt | cksum)-$extra
  stamp=.venv/.headway-installed-$extra
  python=$(find_python)
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing headway[$extra] into .venv (a few minutes the first time) ..."
    # pip compiles to bytecode on one processor, and so not at all here: torch is compiled while the rest
    # is fetched, the rest on all processors.
    local pip=(.venv/bin/python -m pip install --quiet --no-compile)
    local compile=(.venv/bin/python -m compileall -qq -j 0)
    # torch first and by its pin. Builds for GPUs bring the one triton they work with, others none.
    "${pip[@]}" --constraint constraints.txt torch numpy
    .venv/bin/python -c 'import triton' 2>/dev/null ||
      "${pip[@]}" --constraint constraints-triton.txt 'triton; platform_system == "Linux"'
    "${compile[@]}" .venv/lib/python*/site-packages/torch &
    "${pip[@]}" --constraint constraints.txt --editable ".[$extra]"
    wait $! || true
    "${compile[@]}" .venv/lib || true  # what cannot be compiled is of no use to any Python here
    echo "$wanted" > "$stamp"
  fi
}
