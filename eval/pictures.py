"""Pictures of results for papers and run folders, in the format that the file suffix names, without a display."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogFormatter, LogLocator
from PIL import Image

from dpcache.errors import SettingError
from eval.files import atomic

STYLE = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "figure.dpi": 200,
    "image.interpolation": "nearest",
    "figure.facecolor": "white",
    "text.parse_math": False,  # a prompt or label with two $ is no formula; so axes need formatters without formulas
}
COMPUTED, PREDICTED, PATH = "#1f4e79", "#dde7f0", "#d1495b"


def save(figure: Figure, path: str | Path) -> Path:
    """Writes the figure completely or not at all, see `eval.files.atomic`."""
    path = Path(path)
    with atomic(path) as part:
        figure.savefig(part, format=path.suffix[1:])
    return path


def plain_ticks(axis: Axis) -> None:
    """Labels a logarithmic axis with numbers instead of formulas, which are not drawn, see `STYLE`."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter())


def still(image: np.ndarray, frames: int = 4) -> np.ndarray:
    """An image (H, W, 3) as it is, or of a video (F, H, W, 3) a strip of `frames` frames, evenly spaced from the first
    to the last, side by side with a thin white line between them."""
    if image.ndim == 3:
        return image
    chosen = image[np.linspace(0, len(image) - 1, min(frames, len(image))).round().astype(int)]
    line = np.full_like(chosen[0][:, : max(image.shape[2] // 64, 1)], 255)
    return np.concatenate([part for frame in chosen for part in (line, frame)][1:], axis=1)


@matplotlib.rc_context(STYLE)
def grid(path: str | Path, rows: dict[str, np.ndarray], prompts: Sequence[str], limit: int = 8) -> Path:
    """Side-by-side comparison: one row per label, one column per prompt, at most `limit` columns.

    `rows[label]`: uint8 images (N, H, W, 3) or videos (N, F, H, W, 3), all of one shape; N prompts. About 1400 pixels
    wide for 3 columns or more. Raises SettingError when the shapes or the number of prompts disagree.
    """
    if any(np.ndim(images) == 5 for images in rows.values()):
        limit = limit // 3 + 1
    rows = {label: np.stack([still(image) for image in images[:limit]]) for label, images in rows.items()}
    prompts = prompts[:limit]
    shapes = {images.shape for images in rows.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != len(prompts):
        raise SettingError(f"grid needs images of one shape and as many prompts, got {shapes}, {len(prompts)} prompts")
    count, height, width, _ = next(iter(shapes))
    columns = min(count, limit)
    # All lengths in pixels, so that every image lands on whole pixels and is resampled once.
    gap, left, line = 8, 72, 24
    cell = min((1400 - left) // columns - gap, 420)
    tall = round(cell * height / width)
    wrap = max(cell // 12, 8)
    captions = [textwrap.wrap(p, wrap, max_lines=4, placeholder=" …") for p in prompts[:columns]]
    top = line * max(len(c) for c in captions) + 2 * gap
    total = left + columns * (cell + gap), top + len(rows) * (tall + gap)

    figure = Figure(figsize=(total[0] / 200, total[1] / 200))
    for column, caption in enumerate(captions):
        x = left + column * (cell + gap) + cell / 2
        figure.text(x / total[0], 1 - (top - gap) / total[1], "\n".join(caption), ha="center", va="bottom", fontsize=7)
    for row, (label, images) in enumerate(rows.items()):
        y = total[1] - top - row * (tall + gap) - tall
        label = "\n".join(textwrap.fill(part, max(tall // 12, 8)) for part in label.split(", "))
        at = (left / 2 / total[0], (y + tall / 2) / total[1])
        figure.text(*at, label, rotation=90, ha="center", va="center", multialignment="center", fontsize=7.5)
        for column in range(columns):
            image = Image.fromarray(images[column]).resize((cell, tall), Image.Resampling.LANCZOS)
            figure.figimage(np.asarray(image), left + column * (cell + gap), y)
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def timeline(path: str | Path, steps: Sequence[int], num_inference_steps: int, title: str = "") -> Path:
    """The schedule: one slot per step, computed ones dark and numbered, predicted ones light; 50 slots to a line.

    `steps`: 0-based computed steps. Raises SettingError for a step outside 0..T-1.
    """
    computed = set(steps)
    if not computed <= set(range(num_inference_steps)):
        raise SettingError(f"steps {sorted(computed)} do not all lie in 0..{num_inference_steps - 1}")
    per_line = min(num_inference_steps, 50)
    lines = -(-num_inference_steps // per_line)
    figure = Figure(figsize=(7, 0.34 + 0.28 * lines))
    axes = figure.add_axes((0.01, 0.02, 0.98, 0.28 * lines / (0.34 + 0.28 * lines)))
    gap = 0.1 * per_line / 50
    for step in range(num_inference_steps):
        line, slot = divmod(step, per_line)
        color = COMPUTED if step in computed else PREDICTED
        axes.add_patch(Rectangle((slot + gap / 2, line + 0.05), 1 - gap, 0.85, color=color, lw=0))
        if step in computed:
            axes.text(slot + 0.5, line + 0.49, step, color="white", ha="center", va="center", fontsize=6.5)
    axes.set(xlim=(0, per_line), ylim=(lines, 0))
    axes.axis("off")
    axes.set_title(title, pad=5)
    counts = (
        (COMPUTED, f"computed ({len(computed)})"),
        (PREDICTED, f"predicted ({num_inference_steps - len(computed)})"),
    )
    axes.legend(
        handles=[Patch(color=color, label=label) for color, label in counts],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        handlelength=1,
        handleheight=1,
        borderaxespad=0.3,
    )
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def quality_curve(
    path: str | Path, wanted: float, of: str, tried: Mapping[float, float], predicted: Mapping[int, float]
) -> Path:
    """Quality over computed steps, see `dpcache.quality.Found`: predicted values as a line, confirmed values as points,
    the wanted value as a horizontal line. `of`: name of the measure, for the axis."""
    figure = Figure(figsize=(4, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(wanted, color=PATH, lw=0.8, label=f"wanted: {wanted:g}")
    if predicted:
        axes.plot(list(predicted), list(predicted.values()), color=COMPUTED, lw=1, label="predicted")
    axes.plot(list(tried), list(tried.values()), "o", color=COMPUTED, markersize=4, label="on the calibration prompts")
    axes.set(xscale="log", xlabel="computed steps", ylabel=of)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


@matplotlib.rc_context(STYLE)
def cost_heatmap(path: str | Path, cost: np.ndarray, steps: Sequence[int]) -> Path:
    """The lowest cost of each jump from key j to the next key k, on a logarithmic scale, and the planned path over it.

    `cost`: (T, T+1, T+1), or more leading axes for longer histories; infinite where not allowed. The picture shows the
    minimum over the earlier keys. `steps`: 0-based planned keys; the last jump goes to T, the end.
    Raises SettingError when no entry of the cost is finite and positive.
    """
    cost = np.asarray(cost, dtype=np.float64)
    best = cost.min(axis=tuple(range(cost.ndim - 2)))  # (T+1, T+1), [j, k]
    positive = best[np.isfinite(best) & (best > 0)]
    if not positive.size:
        raise SettingError("the cost holds no finite positive entry to draw")
    # Jumps to the very next step predict nothing and cost 0, which has no logarithm: they get the lowest colour.
    shown = np.where(np.isfinite(best), np.maximum(best, positive.min()), np.nan)

    figure = Figure(figsize=(5, 4.1), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shown.T, origin="lower", aspect="auto", cmap="viridis", norm=LogNorm())
    keys = [*steps, len(best) - 1]
    axes.plot(keys[:-1], keys[1:], "o-", color=PATH, markersize=4, lw=1, mec="white", mew=0.6, label="planned path")
    axes.set(xlabel="current key j (step)", ylabel="next key k (step; last row: the end)")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, label="path cost of the jump, minimum over earlier keys")
    plain_ticks(bar.ax.yaxis)
    bar.outline.set_visible(False)
    return save(figure, path)
