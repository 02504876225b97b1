"""The paper's Figures 2 to 5 and 12 of any checkpoint: CSV files, and a picture of each.

Enters: a loaded run and the name of a dataset's split. Leaves, in a directory: `flow`, `entropy`, `map`, `dropped` and
`compressor`, each as .csv and .png, and `README.md`, which says what they show.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from llava_mini_jax.analyze.attention import KINDS, AttentionSums, added, attention_sums, right_without_vision
from llava_mini_jax.config import ConfigError
from llava_mini_jax.data.inputs import load_inputs
from llava_mini_jax.infer.load import Loaded
from llava_mini_jax.sharding import batch_sharding, check_batch, use_mesh
from llava_mini_jax.train.tree import merge
from llava_mini_jax.types import Batch

_SHOWN = 6  # images of which the compressor's map is drawn
_COLORS = ('#1f4e9c', '#c4572b', '#3a8f5c')


def attention_report(
  run: Loaded, dataset: Path, split: str, out: Path, *, samples: int = 256, batch_size: int = 16, window: int = 0
) -> None:
  """Writes everything that the model has.

  Args:
    samples: how many records are seen, each with one of its questions and the true answer; a multiple of batch_size.
    window: how many consecutive layers do not see vision at a time; 0 = about a quarter of them.
  Raises:
    ConfigError: samples that are no multiple. MeshError: batch_size does not divide over the mesh. DataError: as
    reading the split does.
  """
  if samples < 1 or samples % batch_size:
    raise ConfigError(f'samples: expected a positive multiple of batch_size={batch_size}; found {samples}')
  check_batch(batch_size, run.mesh)
  layers = run.experiment.model.decoder.num_hidden_layers
  ranges = windows(layers, window or max(1, layers // 4))
  batches = _batches(run, dataset, split, samples, batch_size)
  first = next(batches)
  out.mkdir(parents=True, exist_ok=True)
  batches = itertools.chain([first], batches)
  sums, right = _seen(run, tqdm.tqdm(batches, 'attention', samples // batch_size, unit='batch'), ranges)
  drawn = ['flow', 'entropy', 'map', 'dropped', 'compressor']
  if not write_attention(sums, out):
    drawn.remove('map')
  write_dropped(ranges, right, out)
  model = run.experiment.model
  if model.compressor_attends:
    write_compressor(*_compressed(run, first), out)
  else:
    drawn.remove('compressor')
  texts = (f'![]({name}.png)\n\n**{name}** {_SHOWS[name]}' for name in drawn)
  (out / 'README.md').write_text('\n\n'.join([_about(run, dataset, split, samples), *texts]) + '\n')


_SHOWS = dict(
  flow='(Figure 2): attention from one kind of tokens (panel) to another (line), layer by layer; heads averaged, '
  'summed over the tokens attended to, mean over those tokens that attend to that kind at all (Appendix A). What a '
  'token gives to all kinds together is 1.',
  entropy='(Figure 3): of attention within a kind, renormalised, in nats, mean over tokens that attend to it; heads '
  'averaged first. Even attention to n tokens has log n.',
  map='(Figure 4): attention of text to each vision token at its place in the image, mean over text that follows it; '
  'first, middle and last layer, one logarithmic scale.',
  dropped='(Figure 5): answers that stay right when some consecutive layers do not see vision tokens (which still see '
  'themselves). An answer is right if every token of it is the most likely one after the true ones before it.',
  compressor='(Figure 12): where the learnable queries look, mean over heads and queries.',
)


def windows(layers: int, size: int) -> list[tuple[int, int]]:
  """(first, end) of consecutive layers, half a window apart; before them none, after them all."""
  starts = range(0, layers - size + 1, max(1, size // 2))
  return [(0, 0), *((start, start + size) for start in starts), (0, layers)]


def _batches(run: Loaded, dataset: Path, split: str, samples: int, batch_size: int) -> Iterator[Batch]:
  """One question of each record, in an order of its own, as it was trained but for augmentation and packing."""
  data = dataclasses.replace(
    run.experiment.data,
    dataset=str(dataset),
    split=split,
    mixture=(),
    flip=0.0,
    shift=0,
    pack=False,
    group_by_length=False,
    side_by_side=False,
    max_turns=1,
    workers=0,
    features='',
    bad_sample='raise',
  )
  inputs = dataclasses.replace(load_inputs(data, run.experiment.model), tokenizer=run.tokenizer)
  rows = inputs.iterator(None, batch_size=batch_size, seed=0, shard_index=0, shard_count=1)
  for fields in itertools.islice(rows, samples // batch_size):
    yield Batch(**fields)


def _seen(
  run: Loaded, batches: Iterable[Batch], ranges: Sequence[tuple[int, int]]
) -> tuple[AttentionSums, list[tuple[int, int]]]:
  """Sums over the batches, and right answers and answers for each range of layers."""
  layers = run.experiment.model.decoder.num_hidden_layers
  look = jax.jit(lambda params, batch: attention_sums(merge(run.graphdef, params), batch))
  answer = jax.jit(lambda params, batch, dropped: right_without_vision(merge(run.graphdef, params), batch, dropped))
  sums, right = None, np.zeros((len(ranges), 2), int)
  with use_mesh(run.mesh):
    for batch in batches:
      batch = jax.device_put(batch, batch_sharding(run.mesh))
      sums = added(sums, look(run.params, batch))
      for i, (first, end) in enumerate(ranges):
        dropped = (np.arange(layers) >= first) & (np.arange(layers) < end)
        right[i] += np.array(jax.device_get(answer(run.params, batch, dropped)))
  return sums, [tuple(row) for row in right.tolist()]


def _compressed(run: Loaded, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
  """A few images uint8[n h w 3] and, for each, attention float32[n grid grid] of the mean query."""

  def weights(params, pixels):
    model = merge(run.graphdef, params)
    _, _, attention = model.compress(model.encode_views(pixels), return_attention=True)
    return attention.mean(1)

  pixels = np.asarray(batch.pixels)[:_SHOWN, 0]
  with use_mesh(run.mesh):
    found = np.asarray(jax.jit(weights)(run.params, pixels))
  side = math.isqrt(found.shape[1])
  return pixels[:, -1], found.reshape(-1, side, side)


def _about(run: Loaded, dataset: Path, split: str, samples: int) -> str:
  model = run.experiment.model
  return (
    f'# Where the model looks\n\n{samples} questions of {dataset.name}/{split}; step {run.step}; decoder of '
    f'{model.decoder.num_hidden_layers} layers, compressor {model.compressor.kind}, '
    f'{model.prefusion.num_layers} pre-fusion layers.'
  )


def write_attention(sums: AttentionSums, out: Path) -> bool:
  """flow, entropy and map as CSV and PNG; False = there is no map, for vision tokens are no square or one alone."""
  flow, entropy, looks = sums.mean_flow(), sums.mean_entropy(), sums.mean_map()
  rows = [[layer, KINDS[i], KINDS[j], value] for (layer, i, j), value in np.ndenumerate(flow)]
  _csv(out / 'flow.csv', ('layer', 'from', 'to', 'attention'), rows)
  rows = [[layer, KINDS[i], value] for (layer, i), value in np.ndenumerate(entropy)]
  _csv(out / 'entropy.csv', ('layer', 'to', 'nats'), rows)
  rows = [[layer, token, value] for (layer, token), value in np.ndenumerate(looks)]
  _csv(out / 'map.csv', ('layer', 'vision_token', 'attention'), rows)

  figure = Figure(figsize=(12, 3.4), layout='constrained')
  for axes, i in zip(figure.subplots(1, 3, sharey=True), range(3), strict=True):
    _lines(axes, flow[:, i], f'from {KINDS[i]}', 'attention' if i == 0 else '')
    axes.set_ylim(-0.02, 1.02)
  figure.savefig(out / 'flow.png', dpi=120)
  figure = Figure(figsize=(5, 3.4), layout='constrained')
  axes = figure.subplots()
  _lines(axes, entropy, 'within a kind', 'entropy (nats)')
  axes.set_ylim(bottom=0)
  figure.savefig(out / 'entropy.png', dpi=120)
  side = math.isqrt(looks.shape[1])
  if side < 2 or side * side != looks.shape[1] or not looks.any():
    return False
  _maps(looks.reshape(-1, side, side), out / 'map.png')
  return True


def write_dropped(ranges: Sequence[tuple[int, int]], right: Sequence[tuple[int, int]], out: Path) -> None:
  """dropped.csv and .png of `windows` and (right answers, answers) for each."""
  shares = [good / max(count, 1) for good, count in right]
  rows = [[first, end, good, count] for (first, end), (good, count) in zip(ranges, right, strict=True)]
  _csv(out / 'dropped.csv', ('first_layer', 'end_layer', 'right', 'answers'), rows)
  names = ['none', *(f'{first}–{end - 1}' for first, end in ranges[1:-1]), 'all']
  figure = Figure(figsize=(max(4, 0.5 * len(names) + 2), 3.4), layout='constrained')
  axes = figure.subplots()
  axes.bar(names, shares, color=['#8a8a8a', *['#1f4e9c'] * (len(names) - 2), '#c4572b'])
  axes.set_ylim(0, 1)
  axes.set_ylabel('answers right')
  axes.set_xlabel('layers that do not see vision tokens')
  axes.tick_params(axis='x', rotation=45)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(out / 'dropped.png', dpi=120)


def write_compressor(images: np.ndarray, weights: np.ndarray, out: Path) -> None:
  """compressor.csv and .png: images uint8[n h w 3] above, the same under their weights [n grid grid] below."""
  rows = [[*place, value] for place, value in np.ndenumerate(weights)]
  _csv(out / 'compressor.csv', ('image', 'row', 'column', 'attention'), rows)
  figure = Figure(figsize=(1.9 * len(images), 4), layout='constrained')
  grid = figure.subplots(2, len(images), squeeze=False)
  height, width = images.shape[1:3]
  for (above, below), image, looks in zip(grid.T, images, weights, strict=True):
    above.imshow(image)
    below.imshow(image.mean(-1), cmap='gray')
    shown = below.imshow(looks, cmap='inferno', alpha=0.65, extent=(0, width, height, 0), vmin=0)
    for axes in (above, below):
      axes.set_axis_off()
  figure.colorbar(shown, ax=grid[1].tolist(), shrink=0.8, label='attention (last image)')
  figure.savefig(out / 'compressor.png', dpi=120)


def _lines(axes, values: np.ndarray, title: str, label: str) -> None:
  """values [layer 3], one line for each kind attended to."""
  for kind, color, line in zip(KINDS, _COLORS, values.T, strict=True):
    axes.plot(line, marker='o', markersize=3, color=color, label=f'to {kind}')
  axes.set_title(title)
  axes.set_xlabel('layer')
  axes.set_ylabel(label)
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.grid(alpha=0.25)
  axes.legend(frameon=False, fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)


def _maps(looks: np.ndarray, file: Path) -> None:
  """looks [layer grid grid], of the first, the middle and the last layer."""
  shown = sorted({0, len(looks) // 2, len(looks) - 1})
  scale = LogNorm(vmin=max(looks[shown].min(), looks[shown].max() * 1e-4), vmax=looks[shown].max())
  figure = Figure(figsize=(3.2 * len(shown) + 1, 3.4), layout='constrained')
  grid = figure.subplots(1, len(shown), squeeze=False)[0]
  for axes, layer in zip(grid, shown, strict=True):
    drawn = axes.imshow(looks[layer], cmap='viridis', norm=scale)
    axes.set_title(f'layer {layer}')
    axes.set_axis_off()
  figure.colorbar(drawn, ax=grid.tolist(), shrink=0.8, label='attention of text')
  figure.savefig(file, dpi=120)


def _csv(file: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
  with file.open('w', newline='') as stream:
    writer = csv.writer(stream)
    writer.writerow(header)
    writer.writerows([[f'{x:.6g}' if isinstance(x, float) else x for x in row] for row in rows])
