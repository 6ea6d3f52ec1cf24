#!/usr/bin/env bash
# Install cosmos from this clone into its .venv, and FFmpeg if it is missing.
#
#   bash recipes/install.sh [--test] [--torch cpu|cuda|cu126|cu128|cu130]
#
#   --test    also install what the tests need
#   --torch   the build of torch; cuda is the newest that the NVIDIA driver runs, and the default
#             if there is an NVIDIA GPU; else cpu
#
# Exit code 3: this machine lacks something; the last lines name it and what to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=train,guardrails
torch=
while (($#)); do
  case $1 in
    --test) extras=$extras,test ;;
    --torch) torch=${2:?cpu, cuda, cu126, cu128 or cu130} && shift ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" && exit 2 ;;
  esac
  shift
done

fail() {
  echo "error: $*" >&2
  exit 3
}

# A finished installation leaves this file. It is valid until one of the hashed files changes.
key=$(cat pyproject.toml .ci/constraints.txt recipes/constraints-*.txt <(pwd) | sha256sum | cut -c1-16)
stamp=.venv/installed-$key
if [[ -z $torch && -e $stamp-$extras && -x .venv/bin/cosmos ]]; then
  echo "already installed in $PWD/.venv"
  exit 0
fi

# Print the first Python that fits: on the PATH, of uv, conda or pyenv.
find_python() {
  local candidate
  shopt -s nullglob
  for candidate in python3.11 python3.12 python3.13 python3 \
    "$(UV_PYTHON_DOWNLOADS=never uv python find '>=3.11,<3.14' 2>/dev/null)" \
    {"${CONDA_PREFIX:-/opt/conda}",~/{mini,ana}conda3,~/miniforge3,/opt/conda}{,/envs/*}/bin/python3 \
    ~/.pyenv/versions/3.1[123].*/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# Print the commands that install a Python that fits on this distribution.
python_commands() {
  local ID= ID_LIKE= sudo="sudo "
  ((EUID)) || sudo=
  # shellcheck source=/dev/null
  . "${OS_RELEASE:-/etc/os-release}" 2>/dev/null || true
  if command -v uv >/dev/null; then
    echo "  uv python install 3.12"
  elif command -v conda >/dev/null; then
    echo "  conda create -y -n cosmos python=3.12"
    echo "  conda activate cosmos"
  elif ((EUID)) && ! command -v sudo >/dev/null; then
    echo "  curl -LsSf https://astral.sh/uv/install.sh | sh"
    echo "  ~/.local/bin/uv python install 3.12"
  else
    case " $ID $ID_LIKE " in
      *" ubuntu "*)
        echo "  ${sudo}apt-get update && ${sudo}apt-get install -y software-properties-common"
        echo "  ${sudo}add-apt-repository -y ppa:deadsnakes/ppa"
        echo "  ${sudo}apt-get install -y python3.12 python3.12-venv" ;;
      *" rhel "* | *" fedora "*) echo "  ${sudo}dnf install -y python3.12" ;;
      *suse*) echo "  ${sudo}zypper install -y python312" ;;
      *)
        echo "  curl -LsSf https://astral.sh/uv/install.sh | sh"
        echo "  ~/.local/bin/uv python install 3.12" ;;
    esac
  fi
  echo "  bash recipes/install.sh"
}

PATH=$PATH:~/.local/bin
python=$(find_python) ||
  fail "Python 3.11, 3.12 or 3.13 is needed, found $(python3 --version 2>/dev/null || echo none). Run:
$(python_commands)"

# Print the newest torch build that the NVIDIA driver runs.
# Source: NVIDIA's CUDA Toolkit Release Notes, "CUDA Toolkit and Corresponding Driver Versions". A
# driver of R525 or newer runs every CUDA 12, by minor version compatibility.
build_of_driver() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
  case ${driver%%.*} in
    "" | *[!0-9]*) echo cu130 ;;
    *)
      ((${driver%%.*} >= 525)) ||
        fail "the NVIDIA driver $driver is too old: torch needs R525 or newer, and R580 for CUDA 13." \
          "Update the driver, or use the CPU: bash recipes/install.sh --torch cpu"
      local build=cu126
      ((${driver%%.*} < 570)) || build=cu128
      ((${driver%%.*} < 580)) || build=cu130
      echo "NVIDIA driver $driver: $build" >&2
      echo "$build" ;;
  esac
}

pip=(.venv/bin/python -m pip --disable-pip-version-check)
installed_torch() {
  .venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null
}

present=$(installed_torch || true)
case $present in
  "") built= ;;
  *+cpu) built=cpu ;;
  *+*) built=${present##*+} ;;
  *) built=cu130 ;;
esac
if [[ -z $torch && $built != cpu ]]; then
  nvidia-smi -L 2>/dev/null | grep -q '^GPU' && torch=cuda || torch=${built:-cpu}
fi
: "${torch:=$built}"
if [[ $torch == cuda ]]; then
  torch=$(build_of_driver)
  # An older build than the driver could run stays.
  [[ -n $built && -e recipes/constraints-$built.txt && ! $built > $torch ]] && torch=$built
fi
constraints=.ci/constraints.txt
if [[ $torch == cpu ]]; then
  room=1300 cost="270 MB to download, 1.3 GB on disk, 2 minutes"
else
  room=7000 cost="3 GB to download, 7 GB on disk, 5 to 15 minutes"
  constraints=recipes/constraints-$torch.txt
  [[ -e $constraints ]] || fail "--torch $torch: must be cpu, cuda, cu126, cu128 or cu130"
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
      fail "$python has no pip: apt-get install ${python##*/}-venv"
  fi
fi
"${pip[@]}" install --quiet --constraint .ci/constraints.txt pip

version=$(sed -n 's/^torch==//p' .ci/constraints.txt)
[[ -z $built || $torch == "$built" ]] || "${pip[@]}" uninstall --quiet --yes torch
if [[ $torch != cu130 && $torch != "$built" ]]; then
  # PyPI has only the CUDA 13 build; `+cpu` cannot match it. Retry only once: if PyTorch's index
  # cannot be reached, an index in pip's own configuration may have the file.
  "${pip[@]}" install --no-compile --no-deps --retries 1 --timeout 30 "torch==$version+$torch" \
    --extra-index-url "https://download.pytorch.org/whl/$torch" ||
    fail "no $torch build of torch $version for $("$python" --version) could be fetched; try again," \
      "or install another build that the driver runs: bash recipes/install.sh --torch BUILD"
fi

echo "Installing the packages takes about a minute."
# setuptools prints long warnings about every editable installation.
PYTHONWARNINGS=ignore "${pip[@]}" install --quiet --no-compile --constraint "$constraints" \
  --editable ".[$extras]"
# pip would compile on one core. A few packages have .py files that are not valid Python, so the exit
# code is ignored.
.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
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
