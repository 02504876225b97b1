"""A tower run once and read ever after gives the losses of one that runs in every step, and none of its work."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_model import quick_jit, random_params, with_params
from tiny_run import MODEL, command, experiment

from llava_mini_jax.config import ConfigError, LlavaMiniConfig
from llava_mini_jax.convert.run_weights import write_run
from llava_mini_jax.convert.tensor_writer import Planned
from llava_mini_jax.data import feature_writer
from llava_mini_jax.data import media as media_module
from llava_mini_jax.data.errors import DataError
from llava_mini_jax.data.features import Features, directory_of, open_features
from llava_mini_jax.data.inputs import load_inputs, media_processor
from llava_mini_jax.data.pipeline import device_batches
from llava_mini_jax.data.prepare import parse_shard, prepare
from llava_mini_jax.data.records import open_split
from llava_mini_jax.experiment import DataConfig, Experiment
from llava_mini_jax.sharding import batch_sharding, make_mesh, use_mesh
from llava_mini_jax.train.features import check_experiment, check_tower, tower_fingerprint, write_features
from llava_mini_jax.train.loss import next_token_loss
from llava_mini_jax.train.metrics import LOG_NAME
from llava_mini_jax.train.step import make_trainer
from llava_mini_jax.train.tree import unflatten
from llava_mini_jax.types import Batch

pytest.importorskip('av')

GROUPS = (('vision/.*', 'frozen'), ('.*', 1e-2))
FRAMES = 6


@pytest.fixture(scope='module')
def root(tmp_path_factory) -> Path:
  """Datasets `images` (one text alone, one with two images) and `videos`, and the run `start`."""
  root = tmp_path_factory.mktemp('features')
  for i in range(8):
    noise = np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), np.uint8)
    Image.fromarray(noise).save(root / f'{i}.png')
  frames = [Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)) for i in range(FRAMES)]
  frames[0].save(root / 'clip.gif', save_all=True, append_images=frames[1:], duration=1000)

  def write(name, samples):
    found = [
      dict(id=str(i), **media, conversations=[{'from': 'human', 'value': text}, {'from': 'gpt', 'value': f'red {i}'}])
      for i, (media, text) in enumerate(samples)
    ]
    (root / f'{name}.json').write_text(json.dumps(found))
    prepare([str(root / f'{name}.json')], root / name, media_roots=[root])

  images = [(dict(image=f'{i}.png'), '<image> colour?') for i in range(8)]
  write('images', [*images, ({}, 'no image'), (dict(image=['0.png', '1.png']), '<image> or <image>')])
  write('videos', [(dict(video='clip.gif'), '<video> what?')] * 2)
  make_start(root, 'start', seed=0)
  return root


def make_start(root: Path, name: str, seed: int) -> None:
  """An imported run with random parameters."""
  params = random_params(MODEL, seed)
  planned = [
    Planned(path, value.shape, np.dtype(np.float32), functools.partial(lambda value: [value], value))
    for path, value in sorted(params.items())
  ]
  (root / name).mkdir()
  run = experiment(root / 'images')
  write_run(root / name, run, planned, max_shard_bytes=10**9, progress=lambda _: None)
  shutil.copytree(root / 'images' / 'tokenizer', root / name / 'tokenizer')


def run(root: Path, *, model: dict | None = None, train: dict | None = None, **data) -> Experiment:
  defaults = dict(groups=GROUPS, init_from=str(root / 'start'), max_steps=4, save_every=2, log_every=2)
  base = experiment(root / 'images', **(defaults | (train or {})))
  fields = dict(dataset=str(root / 'images'), template='chatml', row_length=64, visuals_per_row=2)
  fields |= dict(dataset='') if 'mixture' in data else {}
  return dataclasses.replace(base, model=dataclasses.replace(MODEL, **(model or {})), data=DataConfig(**fields | data))


def with_features(config: Experiment, path: Path) -> Experiment:
  return dataclasses.replace(config, data=dataclasses.replace(config.data, features=str(path)))


def write(config: Experiment, path: Path, **options) -> int:
  return write_features(config, path, batch_size=8, **options)


def a_batch(config: Experiment) -> Batch:
  inputs = load_inputs(config.data, config.model, start=config.train.init_from)
  order = inputs.order(batch_size=8, seed=0)
  batches = device_batches(
    inputs.iterator(order, batch_size=8, seed=0, shard_index=0, shard_count=1), batch_sharding(make_mesh()), ahead=0
  )
  batch = next(batches)
  batches.close()
  return jax.device_get(batch)


def loss_and_gradients(config: Experiment, batch: Batch):
  """Of all but the tower."""
  return _loss_and_gradients(config.model)(batch)


@functools.cache
def _loss_and_gradients(model: LlavaMiniConfig):
  params = random_params(model)
  trained = {path: value for path, value in params.items() if not path.startswith('vision/')}

  @quick_jit
  def both(trained, batch):
    def loss(trained):
      return next_token_loss(with_params(model, params | trained)(batch), batch.targets, batch.loss_mask)[0]

    return jax.value_and_grad(loss)(trained)

  return lambda batch: jax.device_get(both(trained, batch))


def mixture(root: Path) -> tuple:
  return ((str(root / 'videos'), 'train', 'end:1', 2.0), (str(root / 'images'), 'train', 'first:9', 1.0))


LAYOUTS = {
  'images': dict(),
  'hd': dict(grid=2, aspect='crop'),
  'packed': dict(pack=True, visuals_per_row=5),
  'lengths': dict(group_by_length=True, row_lengths=(32, 64)),
  'videos': dict(mixture=True, visuals_per_row=FRAMES),
}


@pytest.mark.parametrize(
  'layout', ['packed', 'videos', *(pytest.param(name, marks=pytest.mark.slow) for name in ('images', 'hd', 'lengths'))]
)
def test_losses_and_gradients_are_those_of_the_tower(root, tmp_path, layout):
  fields = dict(LAYOUTS[layout])
  if 'mixture' in fields:
    fields['mixture'] = mixture(root)
  config = run(root, model=dict(text_only='zero_image', visual_chunk=2 if layout == 'videos' else 0), **fields)
  expected = a_batch(config)
  write(config, tmp_path, dtype='float32')
  batch = a_batch(with_features(config, tmp_path))
  for field in dataclasses.fields(Batch):
    if field.name not in ('pixels', 'features', 'branch_ids'):
      np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name), err_msg=field.name)
  assert batch.pixels.size == 0 and batch.pixels.shape[:3] == expected.pixels.shape[:3]
  assert batch.features.dtype == np.float32
  if layout == 'lengths':  # whose rows the model reads like any others
    return
  loss, gradients = loss_and_gradients(config, expected)
  found, found_gradients = loss_and_gradients(config, batch)
  assert abs(found - loss) <= 1e-6 * abs(loss)
  for path, gradient in gradients.items():
    scale = max(np.abs(gradient).max(), 1e-3)
    np.testing.assert_allclose(found_gradients[path], gradient, rtol=0, atol=5e-6 * scale, err_msg=path)


def test_bfloat16_rounds_once(root, tmp_path):
  """What is stored is the float32 features to the nearest; the loss moves by as much."""
  config = run(root)
  exact, rounded = (
    a_batch(with_features(config, tmp_path / dtype))
    for dtype in ('float32', 'bfloat16')
    if write(config, tmp_path / dtype, dtype=dtype)
  )
  np.testing.assert_array_equal(rounded.features, exact.features.astype(jnp.bfloat16))
  as_float32 = dataclasses.replace(rounded, features=rounded.features.astype(np.float32))
  swapped = dataclasses.replace(exact, features=np.roll(exact.features, 1, axis=0))
  losses = [loss_and_gradients(config, batch)[0] for batch in (exact, as_float32, swapped)]
  assert 0 < abs(losses[1] - losses[0]) < 2**-8 * losses[0]
  assert abs(losses[2] - losses[0]) > 1e-3


def used(jaxpr, invars) -> list[bool]:
  """Which of its inputs an equation reads, calls looked into."""
  reads = set()
  for equation in jaxpr.eqns:
    inner = equation.params.get('jaxpr')
    if equation.primitive.name in ('pjit', 'jit') and len(inner.jaxpr.invars) == len(equation.invars):
      flags = used(inner.jaxpr, inner.jaxpr.invars)
      reads |= {id(v) for v, flag in zip(equation.invars, flags, strict=True) if flag}
    else:
      reads |= {id(v) for v in equation.invars}
  return [id(v) for v in invars] and [id(v) in reads for v in invars]


def test_the_step_has_no_tower(root, tmp_path):
  config = run(root)
  write(config, tmp_path)
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  trainer = make_trainer(config.model, mesh, groups=GROUPS, factor=lambda step: 1.0)
  reads = {}
  for name, data in (('tower', config), ('features', with_features(config, tmp_path))):
    with use_mesh(mesh):
      jaxpr = jax.make_jaxpr(trainer.step)(trainer.abstract, a_batch(data)).jaxpr
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainer.abstract)]
    flags = used(jaxpr, jaxpr.invars)[: len(paths)]
    reads[name] = {path.split("'")[3] for path, flag in zip(paths, flags, strict=True) if flag and "'vision'" in path}
    assert any(flag for path, flag in zip(paths, flags, strict=True) if "'projector'" in path)
  assert reads == {'tower': {'vision'}, 'features': set()}


def contents(directory: Path) -> dict[str, str]:
  return {
    str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(directory.rglob('*'))
    if path.is_file()
  }


@pytest.fixture
def small_files(monkeypatch):
  monkeypatch.setattr(feature_writer, '_FILE_RECORDS', 3)


class Killed(Exception):
  pass


def test_killed_and_started_again(root, tmp_path, small_files, monkeypatch):
  """In the end the bytes are those of a run that nobody disturbed, and nothing else lies there."""
  config = run(root, grid=2)
  assert write(config, tmp_path / 'whole') == 11  # ten images, one of them twice as two, and the mean colour
  whole = contents(tmp_path / 'whole')
  assert len(whole) == 1 + 2 * 4
  original, kills = feature_writer._encoded, 0

  def until_killed(*arguments):
    for i, features in enumerate(original(*arguments)):
      yield features
      if i == 1:
        raise Killed

  while True:
    monkeypatch.setattr(feature_writer, '_encoded', original if kills else until_killed)
    try:
      write(config, tmp_path / 'killed')
      break
    except Killed:
      kills += 1
      (file,) = (tmp_path / 'killed').glob('*/*.partial')
      file.write_bytes(b'cut short')
      with pytest.raises(DataError, match='E_FEATURES_MISSING'):
        load_inputs(with_features(config, tmp_path / 'killed').data, MODEL)
  assert kills == 1
  assert contents(tmp_path / 'killed') == whole
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'killed').rglob('*')}
  assert write(config, tmp_path / 'killed') == 0
  assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / 'killed').rglob('*')}


def test_processes_share_the_work(root, tmp_path, small_files):
  config = run(root)
  write(config, tmp_path / 'one')
  assert write(config, tmp_path / 'three', shard_index=2, shard_count=3) == 2  # and a text
  assert write(config, tmp_path / 'three', shard_index=0, shard_count=3) == 3 + 3
  directory = directory_of(tmp_path / 'three', open_split(root / 'images', 'train'))
  with pytest.raises(DataError) as error:
    Features(directory)
  assert str(error.value) == (
    f'E_FEATURES_MISSING: {directory}: expected 4 finished files; 1 are missing: '
    'run launch/prepare_data.py --features again'
  )
  assert write(config, tmp_path / 'three', shard_index=1, shard_count=3) == 3
  assert contents(tmp_path / 'three') == contents(tmp_path / 'one')


def test_a_video_is_read_frame_by_frame(root, tmp_path, monkeypatch):
  """Frames are encoded before the last of them is decoded."""
  config, events = run(root, dataset=str(root / 'videos')), []
  original = media_module.read_frames

  def noted(*arguments):
    for frame in original(*arguments):
      events.append('frame')
      yield frame

  monkeypatch.setattr(media_module, 'read_frames', noted)
  source, processor = open_split(root / 'videos', 'train'), media_processor(config.data, MODEL)
  found = feature_writer.estimate(source, processor)
  assert (found.visuals, found.about) == (2 * FRAMES, False)
  events.clear()
  layout = feature_writer.Layout(source.fingerprint, 2, '', {}, 'float32', (1, 16, 16), 2, 2)

  def encode(pixels):
    events.append('encode')
    return np.zeros((2, 1, 16, 16), np.float32)

  (tmp_path / 'x').mkdir()
  assert feature_writer.write_files(tmp_path / 'x', layout, source, processor, encode, files=[0]) == 2 * FRAMES
  waiting = 0
  for event in events:
    waiting += {'frame': 1, 'encode': -2}[event]
    assert waiting <= 3
  assert events.count('encode') == FRAMES


def test_what_is_going_to_be_written_is_said_first(root, tmp_path):
  lines, counts = [], []
  write(
    run(root, grid=2),
    tmp_path,
    report=lines.append,
    progress=lambda split, records: counts.append(records) or (lambda finished: counts.append(-finished)),
  )
  assert lines == [
    f'{root / "images"}:train: 10 images or frames in 10 records, 640 bytes each (5 x 4 x 16 bfloat16): 0.000 GiB'
  ]
  assert sum(counts) == 0 and counts[0] == 11


def test_many_records_are_sampled(root):
  processor = media_processor(run(root).data, MODEL)

  class Many:
    def __init__(self, source):
      self.source = source

    def __len__(self):
      return 10_000

    def __getitem__(self, index):
      return self.source[index % 8]

  found = feature_writer.estimate(Many(open_split(root / 'images', 'train')), processor)
  assert (found.visuals, found.about) == (10_000, True)


@pytest.fixture(scope='module')
def written(root, tmp_path_factory) -> Path:
  write(run(root), found := tmp_path_factory.mktemp('written'))
  return found


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(aspect='crop'), "data.aspect: expected 'crop'; found 'pad'"),
    (dict(grid=2), "data.grid: expected 2; found 1, data.grid_order: expected 'pad_then_split'; found None"),
    (dict(video_fps=2.0), 'data.video_fps: expected 2.0; found 1.0'),
    (dict(frame_resize='aspect'), "data.frame_resize: expected 'aspect'; found 'squash'"),
    (dict(model=dict(dtype='bfloat16')), "model.dtype: expected 'bfloat16'; found 'float32'"),
    (
      dict(model=dict(vision=dataclasses.replace(MODEL.vision, select_layer=-3))),
      'model.vision.run_layers: expected 0; found 1',
    ),
  ],
)
def test_other_settings_are_refused(root, written, change, message):
  directory = directory_of(written, open_split(root / 'images', 'train'))
  other = run(root, **change)
  with pytest.raises(ConfigError) as error:
    open_features(written, open_split(root / 'images', 'train'), other.data, other.model)
  assert str(error.value) == f'features in {directory} were made otherwise: {message}'
  if 'vision' not in (change.get('model') or {}):
    with pytest.raises(ConfigError, match='were made otherwise'):
      write(other, written)


def test_another_tower_is_refused(root, tmp_path):
  if not (root / 'other').exists():
    make_start(root, 'other', seed=1)
  config = run(root)
  write(config, tmp_path / 'features')
  other = with_features(run(root, train=dict(init_from=str(root / 'other'))), tmp_path / 'features')
  mesh = make_mesh((1, 1, 1), jax.devices()[:1])
  tower = {
    seed: unflatten({p: jnp.asarray(v) for p, v in random_params(MODEL, seed).items()})['vision'] for seed in (0, 1)
  }
  first, second = (tower_fingerprint(MODEL.vision, tower[seed], mesh) for seed in (0, 1))
  directory = directory_of(tmp_path / 'features', open_split(root / 'images', 'train'))
  expected = f"features in {directory} were made otherwise: tower: expected '{second}'; found '{first}'"
  trainer = make_trainer(MODEL, mesh, groups=GROUPS, factor=lambda step: 1.0)
  check_tower(Features(directory), other, trainer, dict(vision=tower[0]))
  with pytest.raises(ConfigError) as error:
    check_tower(Features(directory), other, trainer, dict(vision=tower[1]))
  assert str(error.value) == expected
  with pytest.raises(ConfigError) as error:
    write(other, tmp_path / 'features')
  assert str(error.value) == expected


def test_layers_that_never_run_are_no_part_of_a_tower():
  mesh = make_mesh((2, 2, 2))
  whole = dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, keep_unused_layers=True))
  params = {path: jnp.asarray(value) for path, value in random_params(whole).items()}
  cut = {
    path: value[:1] if path.startswith('vision/layers/') else value
    for path, value in params.items()
    if not path.startswith('vision/post_layernorm')
  }
  assert params['vision/layers/fc1/kernel'].shape[0] == 2
  found = {tower_fingerprint(MODEL.vision, unflatten(each)['vision'], mesh) for each in (params, cut)}
  assert len(found) == 1
  cut['vision/class_embedding'] = cut['vision/class_embedding'].at[0].add(1e-6)
  assert tower_fingerprint(MODEL.vision, unflatten(cut)['vision'], mesh) not in found


def test_no_augmentation_and_no_training_of_the_tower(root):
  with pytest.raises(ConfigError) as error:
    run(root, features='x', flip=0.5)
  assert str(error.value) == 'DataConfig.features: expected no flip and no shift with features; found one'
  trainer = make_trainer(MODEL, make_mesh(), groups=(('.*', 1.0),), factor=lambda step: 1.0)
  with pytest.raises(ConfigError) as error:
    check_experiment(run(root, features='x'), trainer)
  assert str(error.value) == (
    'data.features: expected train.groups that freeze the vision tower; found vision/class_embedding training'
  )


def test_features_that_are_not_there(root, tmp_path):
  directory = directory_of(tmp_path, open_split(root / 'images', 'train'))
  with pytest.raises(DataError) as error:
    load_inputs(run(root, features=str(tmp_path)).data, MODEL)
  assert str(error.value) == (
    f'E_NO_FEATURES: {directory}: expected features of this dataset; found none: '
    'write them with launch/prepare_data.py --features'
  )
  with pytest.raises(ConfigError) as error:
    write(run(root, train=dict(init_from='')), tmp_path)
  assert str(error.value) == 'train.init_from: expected the run whose vision tower makes the features; found none'


def test_damage_is_named(root, tmp_path):
  write(run(root), tmp_path, dtype='float32')
  directory = directory_of(tmp_path, open_split(root / 'images', 'train'))
  (items,) = directory.glob('*.array_record')
  good = items.read_bytes()
  for i in range(8):
    ((true,),) = Features(directory)[i]
    at = good.index(true.tobytes()) + 17 * i
    items.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(DataError, match=f'^E_FEATURES_CORRUPT: {directory}: item {i}: cannot be read'):
      Features(directory)[i]
    items.write_bytes(good)
  items.write_bytes(good[: len(good) // 2])
  with pytest.raises(DataError, match='^E_FEATURES_CORRUPT'):
    Features(directory)[9]
  items.write_bytes(good)
  (index,) = directory.glob('*-of-*.json')
  for text, message in (('[[1]]', 'expected the numbers of visuals of 11 records'), ('[', 'cannot be read')):
    index.write_text(text)
    with pytest.raises(DataError, match=f'^E_FEATURES_CORRUPT: {index}: {message}'):
      Features(directory)


def test_workers_hand_features_on(root, tmp_path):
  config = run(root)
  write(config, tmp_path)
  config = with_features(config, tmp_path)
  expected = a_batch(config)
  found = a_batch(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1)))
  for field in dataclasses.fields(Batch):
    np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def curve(workdir: Path) -> list[tuple[float, ...]]:
  rows = [json.loads(line) for line in (workdir / LOG_NAME).read_text().splitlines()]
  return [(row['step'], row['loss'], row['grad_norm']) for row in rows]


@pytest.mark.slow
def test_a_run_with_features(root, tmp_path):
  """The command line writes them, a run learns from them what it would from pixels, and a resume goes on."""
  base = [f'--config=tests/tiny_run.py:{root / "images"}', f'--config.train.init_from={root / "start"}']
  base += ['--config.data.visuals_per_row=2', '--config.train.groups=(("vision/.*", "frozen"), (".*", 1e-2))']
  base += ['--config.train.max_steps=4', '--config.train.save_every=2']

  def trained(*more):
    process = command('train', *base, *more)
    out, err = process.communicate()
    return process.returncode, err

  done = command('prepare_data', '--features', f'--out={tmp_path / "features"}', *base, '--features_dtype=float32')
  out, err = done.communicate()
  assert done.returncode == 0, err
  assert out.splitlines()[0].startswith(f'{root / "images"}:train: 10 images or frames in 10 records, 256 bytes each')
  assert out.splitlines()[-1] == f'11 images and frames encoded; written to {tmp_path / "features"}'
  assert trained(f'--workdir={tmp_path / "pixels"}')[0] == 0
  run = (f'--workdir={tmp_path / "run"}', f'--config.data.features={tmp_path / "features"}')
  assert trained(*run)[0] == 0
  expected = curve(tmp_path / 'run')
  np.testing.assert_allclose(expected, curve(tmp_path / 'pixels'), rtol=1e-4)
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  (tmp_path / 'features').rename(tmp_path / 'moved')
  assert trained(run[0], f'--config.data.features={tmp_path / "moved"}')[0] == 0
  assert curve(tmp_path / 'run') == expected
  code, err = trained(run[0])
  assert code == 1 and re.search(r"\n  features: was {'tower': '\w+', 'dtype': 'float32'}, is None$", err.strip())


@pytest.mark.parametrize('text', ['1', '2/2', '-1/2', 'a/b', '0/0', '1/'])
def test_shards(text):
  assert parse_shard('1/3') == (1, 3)
  with pytest.raises(ConfigError) as error:
    parse_shard(text)
  assert str(error.value) == f'shard: expected I/N with I from 0 to N - 1; found {text!r}'
