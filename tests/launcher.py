"""Many launch commands for the price of one start: imports what they import, then forks for each of them.

python tests/launcher.py CASES.json RESULTS.json

A case is {"script": "train", "arguments": [...], "parse": bool}; with `parse` its flags are read and nothing is run.
A result is {"status": int, "stdout": str, "stderr": str}. What a fork does from there on is what a process of its own
would do: JAX has not started yet, absl has parsed no flag, and the script runs as `__main__`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

from absl import flags

LAUNCH = Path(__file__).parents[1] / 'launch'
STREAMS = {'stdout': 1, 'stderr': 2}
PRELOADED = (
  'llava_mini_jax.cli',  # first, as in the scripts: it silences what others say when they are imported
  'llava_mini_jax.data.prepare',
  'llava_mini_jax.evaluate.run',
  'llava_mini_jax.infer.chat',
  'llava_mini_jax.train.loop',
  'transformers.models.auto',
)


def start(case: dict, outputs: dict[str, tempfile._TemporaryFileWrapper]) -> int:
  """-> process id; the fork itself never returns."""
  pid = os.fork()
  if pid:
    return pid
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for name, descriptor in STREAMS.items():
    os.dup2(outputs[name].fileno(), descriptor)
  script = str(LAUNCH / f'{case["script"]}.py')
  sys.argv = [script, *case['arguments']]
  runpy.run_path(script, run_name='parsed' if case['parse'] else '__main__')
  flags.FLAGS(sys.argv)
  sys.exit()


def main(cases: list[dict]) -> list[dict]:
  for name in PRELOADED:
    importlib.import_module(name)
  gc.freeze()  # else every fork copies what was imported when it ends, which takes a second

  results: list[dict] = [{} for _ in cases]
  waiting, running = list(enumerate(cases)), {}
  while waiting or running:
    while waiting and len(running) < (os.cpu_count() or 1):
      index, case = waiting.pop(0)
      outputs = {name: tempfile.TemporaryFile('w+') for name in STREAMS}  # noqa: SIM115  read when the fork has ended
      running[start(case, outputs)] = index, outputs
    pid, status = os.wait()
    index, outputs = running.pop(pid)
    results[index]['status'] = os.waitstatus_to_exitcode(status)
    for name, file in outputs.items():
      file.seek(0)
      results[index][name] = file.read()
  return results


if __name__ == '__main__':
  Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
