#!/usr/bin/env bash
# Kills and damages real runs at length: the long forms of what docs/reliability.md promises.
# It prints what it measured. Arguments go to pytest: launch/soak.sh -k r3. Seconds are held to, so run it alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec ./launch/test.sh -m soak -n 0 -s -v "$@"
