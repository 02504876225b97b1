#!/usr/bin/env bash
# From a clone to a LLaVA-Mini that answers questions about images it has never seen: one command, no accelerator.
# PYTHON chooses the interpreter (3.11 or newer). Everything it makes lies in .venv, data/ and runs/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export JAX_PLATFORMS=cpu TRANSFORMERS_NO_ADVISORY_WARNINGS=1

say() { printf '\n== %s (%ds)\n' "$1" "$SECONDS"; }

say 'install'
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than Python 3.11; set PYTHON" >&2; exit 1; }
[ -d .venv ] || "$python" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -e .

say 'prepare easy-VQA: 4,000 training images, 9,673 held-out questions'
[ -f data/easy_vqa/summary.json ] || .venv/bin/python launch/prepare_data.py --source=easy_vqa --out=data/easy_vqa

say 'train a one-token LLaVA-Mini from scratch'
.venv/bin/python launch/train.py --config=configs/tiny_easy_vqa.py --workdir=runs/quickstart

say 'evaluate on the held-out questions: real, blank and swapped images'
.venv/bin/python launch/evaluate.py --workdir=runs/quickstart --dataset=data/easy_vqa --split=test \
  --images=real --images=blank --images=swapped

say 'ask one question about one image'
image=$(.venv/bin/python -c 'import easy_vqa; print(easy_vqa.get_test_image_paths()[0])')
echo "what color is the shape? ($image)"
.venv/bin/python launch/chat.py --checkpoint=runs/quickstart --image="$image" 'what color is the shape?'

say 'done'
echo 'loss curve:     runs/quickstart/curves.png'
echo 'contact sheets: runs/quickstart/evaluation/contact_sheet_{real,blank,swapped}.png'
echo 'every answer:   runs/quickstart/evaluation/answers_{real,blank,swapped}.json'
