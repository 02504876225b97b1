#!/usr/bin/env bash
# Installs the test extra into .venv-test and runs the whole suite. Arguments go to pytest: launch/test.sh -m slow
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TRANSFORMERS_NO_ADVISORY_WARNINGS=1
[ -d .venv-test ] || "${PYTHON:-python3}" -m venv .venv-test
.venv-test/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .
if [ $# -eq 0 ]; then set -- -m 'not slow'; fi
exec .venv-test/bin/python -m pytest -n auto --dist loadfile "$@"
