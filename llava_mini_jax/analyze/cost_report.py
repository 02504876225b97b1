"""A config -> what it costs, as text, and the paper's Figures 7, 8 and 9 for it, all from our own counts.

FLOPs by component in both conventions of `flops`, of a prompt, a training step, a frame and a later question; memory by
`memory`. Nothing is allocated and nothing is measured: the latencies in the paper's Figures 7 and 8 are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava_mini_jax.analyze.flops import (
  CONVENTIONS,
  Flops,
  forward_flops,
  later_question_flops,
  prompt_flops,
  recomputed_flops,
  training_flops,
)
from llava_mini_jax.analyze.memory import LOGITS, MIB, image_memory, session_bytes, weight_bytes
from llava_mini_jax.analyze.stations import trained_stations
from llava_mini_jax.analyze.topologies import GIB
from llava_mini_jax.config import CompressorConfig, LlavaMiniConfig
from llava_mini_jax.experiment import Experiment

PAPER_TEXT = 43  # text tokens that reproduce the paper's FLOPs
FIGURE_7_GRIDS, FIGURE_8_GRIDS = (1, 2, 4, 8), (1, 4, 8, 12, 24)
HD_VIEWS = 5  # 2 × 2 crops and the whole image
FRAMES = (1, 10_000)
CARDS = (24, 40, 80)  # GiB of common accelerators
NAMES = dict(vision='vision', projector='projection', compressor='compression', prefusion='pre-fusion', decoder='LLM')
_COLORS = ('#4c78a8', '#72b7b2', '#eeca3b', '#e45756', '#8a8f99')
_UNITS = ((1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'))


def with_grid(config: LlavaMiniConfig, grid: int) -> LlavaMiniConfig:
  """The same model with grid² tokens of learnt queries."""
  compressor = config.compressor if config.compressor.kind == 'query' else CompressorConfig()
  return dataclasses.replace(config, compressor=dataclasses.replace(compressor, grid=grid))


def describe(experiment: Experiment, text: int) -> str:
  """The table. text: tokens of the instruction, system text included; the answer is not in it."""
  config, views = experiment.model, _views(experiment)
  rows = [
    ('this prompt', lambda c: prompt_flops(config, text, views=views, convention=c)),
    ('every patch', lambda c: prompt_flops(config.without_compression(), text, views=views, convention=c)),
    ('8 frames', lambda c: prompt_flops(config, text, visuals=8, convention=c)),
  ]
  if lasting := not config.compressor_reads('text'):
    rows.append(('question 2', lambda c: later_question_flops(config, text, earlier=text, views=views, convention=c)))
  lines = [f'{text} text tokens, {views} view(s), {config.slots_per_visual(views)} vision token(s) to the decoder', '']
  for convention in CONVENTIONS:
    lines += [_line(f'FLOPs, {convention}', [*NAMES.values(), 'total'])]
    counts = {name: count(convention) for name, count in rows}
    lines += [_line(name, [*map(scaled, dataclasses.astuple(f)), scaled(f.total)]) for name, f in counts.items()]
    saved = 1 - counts['this prompt'].total / counts['every patch'].total
    lines += [f'  {saved:.1%} less than every patch', '']
  lines += [*_training(experiment), '', *_memory(config, views)]
  if lasting:
    kept = session_bytes(config, views=views) / MIB
    lines.append(f'an image whose later questions cost no second look: {kept:,.3f} MiB')
  return '\n'.join(lines)


def _views(experiment: Experiment) -> int:
  return experiment.data.grid**2 + 1 if experiment.data.grid > 1 else 1


def _training(experiment: Experiment) -> list[str]:
  """A step on a batch of this config's rows."""
  data, model, batch = experiment.data, experiment.model, experiment.train.batch_size
  sizes = dict(
    rows=batch,
    length=data.row_length,
    visuals=data.visuals_per_row,
    fused_text=data.fused_text or data.row_length,
    views=_views(experiment),
  )
  stations = trained_stations(experiment)
  forward = forward_flops(model, **sizes).total
  both, again = training_flops(model, **stations, **sizes), recomputed_flops(model, **stations, **sizes)
  names = [*sorted(stations['trains']), *(f'adapters of {name}' for name in sorted(stations['adapts']))]
  return [
    f'training step of {batch} rows of {data.row_length} tokens, training {", ".join(names)}:',
    f'  forward {scaled(forward)}, backward {scaled(both - forward)}, computed again {scaled(again)} '
    f'(remat {model.scan.remat}), together {scaled(both + again)}',
  ]


def _memory(config: LlavaMiniConfig, views: int) -> list[str]:
  weights = weight_bytes(config)
  lines = [
    'weights, 16 bits: '
    + ', '.join(f'{NAMES[name]} {size / MIB:,.1f}' for name, size in weights.items())
    + f'; {sum(weights.values()) / MIB:,.1f} MiB'
  ]
  for model, name in ((config, 'this model'), (config.without_compression(), 'every patch')):
    found = {logits: image_memory(model, views=views, logits=logits) for logits in LOGITS}
    lines.append(
      f'an image, {name}: keys and values {found["last"].cache / MIB:,.3f} MiB; '
      f'with the logits of every token {found["all"].total / MIB:,.3f} MiB'
    )
  return lines


def _line(name: str, cells: Sequence[str]) -> str:
  return f'{name:16}' + ''.join(f'{cell:>13}' for cell in cells)


def scaled(flops: float) -> str:
  """FLOPs with three decimals, in P, T, G or M."""
  if not flops:
    return '0'
  size, letter = next((unit for unit in _UNITS if flops >= unit[0]), _UNITS[-1])
  return f'{flops / size:.3f} {letter}'


def pictures(config: LlavaMiniConfig, text: int, out: Path) -> list[Path]:
  """Writes figure_7.png, figure_8.png and figure_9.png; returns their paths."""
  out.mkdir(parents=True, exist_ok=True)
  paths = [out / f'figure_{number}.png' for number in (7, 8, 9)]
  _bars(config, text, FIGURE_7_GRIDS, 1, 'One image, by tokens that the decoder gets', paths[0])
  _bars(config, text, FIGURE_8_GRIDS, HD_VIEWS, 'High resolution: 2 × 2 crops and the whole image', paths[1])
  _frames(config, paths[2])
  return paths


def _bars(config: LlavaMiniConfig, text: int, grids: Sequence[int], views: int, title: str, out: Path) -> None:
  """FLOPs by component, both conventions beside each other."""
  models = [config.without_compression(), *(with_grid(config, grid) for grid in grids)]
  names = [f'{models[0].slots_per_visual(views)}\n(every patch)', *(str(grid**2) for grid in grids)]
  figure = Figure(figsize=(10, 4.2), layout='constrained')
  axes = figure.subplots(1, len(CONVENTIONS), sharey=True)
  for axis, convention in zip(axes, CONVENTIONS, strict=True):
    counts = [prompt_flops(model, text, views=views, convention=convention) for model in models]
    _stack(axis, counts, names)
    axis.set_title(
      f'{convention}: {dict(full="every product", calflops="as the paper counts")[convention]}', fontsize=10
    )
    axis.set_xlabel('vision tokens')
  axes[0].set_ylabel('FLOPs (T)')
  axes[0].set_ylim(top=1.1 * axes[0].get_ylim()[1])
  axes[1].legend(frameon=False, fontsize=8)
  figure.suptitle(f'{title}; {text} text tokens', fontsize=11)
  figure.savefig(out, dpi=120)


def _stack(axis: Axes, counts: Sequence[Flops], names: Sequence[str]) -> None:
  bottom = np.zeros(len(counts))
  for (field, label), color in zip(NAMES.items(), _COLORS, strict=True):
    heights = np.array([getattr(count, field) for count in counts]) / 1e12
    axis.bar(names, heights, bottom=bottom, label=label, color=color, width=0.65)
    bottom += heights
  for x, (count, top) in enumerate(zip(counts, bottom, strict=True)):
    saved = f'\n−{1 - count.total / counts[0].total:.0%}' if x else ''
    axis.text(x, top, f'{top:.2f}{saved}', ha='center', va='bottom', fontsize=8)
  axis.spines[['top', 'right']].set_visible(False)


def _frames(config: LlavaMiniConfig, out: Path) -> None:
  """Weights and what the frames leave behind."""
  figure = Figure(figsize=(7.5, 4.4), layout='constrained')
  axis = figure.subplots()
  frames = np.geomspace(FRAMES[0], FRAMES[-1], 200)
  every_patch = config.without_compression()
  for model, name, color in ((every_patch, 'every patch', '#4c78a8'), (config, 'this model', '#e45756')):
    weights = sum(weight_bytes(model).values())
    for logits, style in (('all', '-'), ('last', '--')):
      each = image_memory(model, logits=logits).total
      kept = 'logits of every token kept' if logits == 'all' else 'of the last token alone'
      label = f'{name}, {kept}: {each / MIB:,.3g} MiB a frame'
      axis.plot(frames, (weights + frames * each) / GIB, style, color=color, label=label)
  weights = sum(weight_bytes(config).values()) / GIB
  top = max(3.3 * weights, 1.2 * (weights + frames[-1] * image_memory(config, logits='all').total / GIB))
  for size in (size for size in CARDS if size < top):
    axis.axhline(size, color='#999999', linewidth=0.7)
    axis.text(frames[0], size, f'{size} GiB', fontsize=8, va='bottom', color='#666666')
  axis.set(xscale='log', xlabel='frames', ylabel='memory (GiB)', ylim=(0, top))
  axis.set_title('Weights, keys and values (16 bits) and logits by length of the video', fontsize=10)
  axis.legend(frameon=False, fontsize=8)
  axis.spines[['top', 'right']].set_visible(False)
  figure.savefig(out, dpi=120)
