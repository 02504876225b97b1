"""launch/convert.py as its user meets it: in, out and in again; mistakes in one line."""

from __future__ import annotations

import hashlib

import hf_directories as hf
from tiny_run import command


def test_import_and_export(tmp_path):
  hf.released(tmp_path / 'hf')
  hf.clip(tmp_path / 'clip')
  hf.llama(tmp_path / 'llama')

  def run(*arguments) -> tuple[int, str, str]:
    process = command('convert', *arguments)
    out, err = process.communicate()
    return process.returncode, out, err

  status, out, err = run('import', f'--from={tmp_path}/hf', f'--to={tmp_path}/run', '--max_shard_size=1MB')
  assert status == 0, err
  assert out.splitlines()[-2:] == [
    '714,336 parameters; 4 vision token(s) per image; 2 pre-fusion layers; template chatml',
    f'written to {tmp_path}/run',
  ]
  status, out, err = run('export', f'--from={tmp_path}/run', f'--to={tmp_path}/out')
  assert status == 0, err
  assert out.splitlines()[-1] == f'written to {tmp_path}/out'
  (line,) = (tmp_path / 'out' / 'SHA256SUMS').read_text().splitlines()
  assert (
    line == f'{hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()}  model.safetensors'
  )

  parts = f'--vision={tmp_path}/clip', f'--decoder={tmp_path}/llama', '--prefusion_init=decoder', '--prefusion_layers=2'
  status, out, err = run('import', *parts, f'--to={tmp_path}/parts')
  assert status == 0, err
  assert ' 1 vision token(s) per image; 2 pre-fusion layers; template chatml' in out


def test_mistakes(tmp_path):
  cases = {
    ('import', f'--from={tmp_path}/none'): f'error: E_NO_WEIGHTS: {tmp_path}/none: no such file or directory',
    ('import',): 'error: expected --vision and --decoder: without --from they are needed',
    ('export',): 'error: expected --from, the directory of a run; found none',
    ('export', f'--from={tmp_path}'): f'error: no checkpoint: {tmp_path}/checkpoints is not a directory',
    ('inport',): "error: expected import or export; found 'inport'",
    (): "error: expected import or export; found ''",
  }
  started = {arguments: command('convert', *arguments, f'--to={tmp_path}/run') for arguments in cases}
  for arguments, process in started.items():
    _, err = process.communicate()
    assert process.returncode == 1
    assert err.splitlines()[-1] == cases[arguments], err
    assert 'Traceback' not in err
