#!/usr/bin/env bash
# Installs what is missing, then format, lint, types and tests.
#
#   bash tests/run.sh [fast|all]
#
#   fast   about 2 minutes on 2 cores: nothing that runs the six verbs
#   all    also the long workflows, and on a GPU the tests that need one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1-} in
  fast) selection="not slow and not gpu and not workflow" ;;
  "") selection="not slow and not gpu" ;;
  all) selection="" ;;
  *) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac

bash recipes/install.sh --test
export PATH=$PWD/.venv/bin:$PATH

ruff format --check cosmos_cli tests
ruff check cosmos_cli tests
mypy
# Three at a time, of one thread each: many wait for a process. Each file stays in one worker, so that
# what its tests share is made once. The long ones count on having the machine for themselves.
workers=3
[[ ${1-} == all ]] && workers=0
export OMP_NUM_THREADS=1
exec pytest -m "$selection" -n "$workers" --dist loadfile --no-loadscope-reorder
