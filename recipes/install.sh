#!/usr/bin/env bash
# Install cosmos from this clone into its .venv, and FFmpeg if it is missing.
#
#   bash recipes/install.sh [--test] [--torch cpu|cuda]
#
#   --test    also install what the tests need
#   --torch   the build of torch; the default is cuda if there is an NVIDIA GPU, else cpu
#
# Exit code 3: this machine lacks something; the last line names it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=train,guardrails
torch=
while (($#)); do
  case $1 in
    --test) extras=$extras,test ;;
    --torch) torch=${2:?cpu or cuda} && shift ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
  esac
  shift
done

fail() {
  echo "error: $*" >&2
  exit 3
}

# A finished installation leaves this file. It is valid until one of the hashed files changes.
key=$(cat pyproject.toml .ci/constraints.txt <(pwd) | sha256sum | cut -c1-16)
stamp=.venv/installed-$key
if [[ -z $torch && -e $stamp-$extras && -x .venv/bin/cosmos ]]; then
  echo "already installed in $PWD/.venv"
  exit 0
fi

python=
for candidate in python3.11 python3.12 python3.13 python3; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[[ -n $python ]] ||
  fail "Python 3.11, 3.12 or 3.13 is needed, found $(python3 --version 2>/dev/null || echo none)"

pip=(.venv/bin/python -m pip --disable-pip-version-check)
installed_torch() {
  .venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

present=$(installed_torch || true)
if [[ -z $torch && -n $present ]]; then
  [[ $present == *+cpu ]] && torch=cpu || torch=cuda
elif [[ -z $torch ]]; then
  nvidia-smi -L 2>/dev/null | grep -q '^GPU' && torch=cuda || torch=cpu
fi
if [[ $torch == cuda ]]; then
  room=7000 cost="3 GB to download, 7 GB on disk, 5 to 15 minutes"
else
  room=1300 cost="270 MB to download, 1.3 GB on disk, 2 minutes"
fi
free=$(df --output=avail --block-size=1MB . | tail -n 1)
[[ -n $present ]] || ((free >= room)) || fail "$room MB of disk space are needed, $PWD has ${free// /} MB"
echo "Installing cosmos into $PWD/.venv ($("$python" --version), torch for $torch): about $cost."
echo "apt-get installs FFmpeg (60 MB) and libde265 if they are missing. Nothing else outside .venv changes."

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  # Debian's Python without python3-venv cannot put pip into a new environment; Debian's pip can.
  if ! "$python" -m venv --clear .venv >/dev/null 2>&1; then
    "$python" -m venv --clear --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet pip ||
      fail "$python has no pip: apt-get install python3-venv"
  fi
fi
"${pip[@]}" install --quiet --constraint .ci/constraints.txt pip

version=$(sed -n 's/^torch==//p' .ci/constraints.txt)
if [[ $torch == cpu && $present != *+cpu ]]; then
  # PyPI has only the CUDA build of several GB; `+cpu` cannot match it. Retry only once: if
  # PyTorch's index cannot be reached, an index in pip's own configuration may have the file.
  "${pip[@]}" install --no-deps --retries 1 --timeout 30 "torch==$version+cpu" \
    --extra-index-url https://download.pytorch.org/whl/cpu ||
    fail "no CPU build of torch $version for $("$python" --version) could be fetched;" \
      "try again, or install the CUDA build (3 GB): bash recipes/install.sh --torch cuda"
elif [[ $torch == cuda && $present == *+cpu ]]; then
  "${pip[@]}" uninstall --quiet --yes torch
fi

echo "Installing the packages takes about a minute."
# setuptools prints long warnings about every editable installation.
PYTHONWARNINGS=ignore "${pip[@]}" install --quiet --constraint .ci/constraints.txt --editable ".[$extras]"
.venv/bin/cosmos setup tiny --install

# Optional: without it, prep does not notice most damage in HEVC videos.
apt() {
  local root=()
  ((EUID == 0)) || root=(sudo -n)
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" >/dev/null 2>&1
}
if ! ldconfig -p 2>/dev/null | grep -q libde265; then
  { apt update && apt install -y --no-install-recommends libde265-0; } ||
    echo "libde265 is missing: most damage in HEVC videos is not noticed; apt-get install libde265-0"
fi

touch "$stamp-train,guardrails" "$stamp-$extras"
echo "Installed. To use it: source $PWD/.venv/bin/activate"
