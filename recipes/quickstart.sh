#!/usr/bin/env bash
# From a bare machine to a video: installs cosmos, runs its six verbs on the tiny recipe, and measures
# the model before and after.
#
#   bash recipes/quickstart.sh [PROMPT]
#
# It is also the pattern for scripts of your own: every verb ends with 0 or a documented code, so
# `set -e` stops at the first one that failed, and stdout carries the result only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prompt=${1:-A video of sks teal robot moving left on a light background.}
echo "Post-training a tiny video model on drawn clips, then making a video of: $prompt"
echo "This takes under 10 minutes on 2 cores, 4 GB of memory, and 330 MB of downloads the first time."
echo "Needed are Linux and Python 3.11 to 3.13. Everything stays in $PWD."

bash recipes/install.sh
PATH=$PWD/.venv/bin:$PATH

cosmos setup tiny
cosmos download tiny
cosmos prep tiny
cosmos train tiny
cosmos promote tiny
video=$(cosmos generate tiny --prompt "$prompt")
cosmos evaluate tiny --prompts 12

echo "Your video: $video"
echo "Before and after, with the curves of the training: $PWD/outputs/evaluation.html"
