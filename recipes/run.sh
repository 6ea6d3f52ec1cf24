#!/usr/bin/env bash
# Run the six verbs on a recipe: check the machine, download, prepare, train, promote, generate.
#
#   bash recipes/run.sh RECIPE [--prompt TEXT] [--set KEY=VALUE ...]
#
# The script ends at the first verb that fails, with the exit code of that verb. The same command
# resumes: each verb keeps what is done. stdout has only the path of the video. Without --prompt,
# the video shows the caption of the first training video.
set -euo pipefail
usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2; }

recipe=${1:-} prompt=
[[ -n $recipe && $recipe != -* ]] || usage
shift
settings=()
while (($#)); do
  case $1 in
    --prompt) prompt=${2:?the text of the prompt} ;;
    --set) settings+=(--set "${2:?KEY=VALUE}") ;;
    *) usage ;;
  esac
  shift 2
done

# In a clone, the command that recipes/install.sh installed; else the one on the PATH.
own=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin
[[ ! -x $own/cosmos ]] || PATH=$(cd "$own" && pwd):$PATH

verb() { cosmos "$1" "$recipe" "${settings[@]}" "${@:2}"; }

verb setup >&2
verb download >&2
prepared=$(verb prep --json)
verb train >&2
verb promote >&2
if [[ -z $prompt ]]; then
  prompt=$(python3 -c '
import json, sys
manifest = json.load(open(json.loads(sys.stdin.read())["artifacts"][0], encoding="utf-8"))
print(next(video["caption"] for video in manifest["videos"] if video["verdict"] == "used"))
' <<<"$prepared")
fi
verb generate --prompt "$prompt"
