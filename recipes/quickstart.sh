#!/usr/bin/env bash
# Install cosmos, run its six verbs on the tiny recipe, and compare the model before and after
# post-training.
#
#   bash recipes/quickstart.sh [PROMPT]
#
# For your own videos, run the verbs with recipes/run.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prompt=${1:-A video of sks teal robot moving left on a light background.}
echo "Post-training a tiny video model on synthetic clips, then generating a video of: $prompt"
echo "This takes under 10 minutes on 2 cores and 4 GB of memory. The first run downloads 330 MB."
echo "It needs Linux and Python 3.11 to 3.13, and writes into $PWD."

bash recipes/install.sh
PATH=$PWD/.venv/bin:$PATH

video=$(bash recipes/run.sh tiny --prompt "$prompt")
cosmos evaluate tiny

echo "Your video: $video"
echo "Before and after, with the training curves: $PWD/outputs/evaluation.html"
