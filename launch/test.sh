#!/usr/bin/env bash
# Installs the test extra into .venv-test and runs the whole suite. Arguments go to pytest: launch/test.sh -m slow runs the long tests alone
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $python is older than Python 3.11; set PYTHON" >&2; exit 1; }
[ -d .venv-test ] || "$python" -m venv .venv-test
.venv-test/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
if [ $# -eq 0 ]; then set -- -m 'not slow and not soak'; fi
exec .venv-test/bin/python -m pytest -n auto --dist loadfile "$@"
