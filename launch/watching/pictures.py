"""Pictures for trackers while a run goes on; launch/reports/ draws them. matplotlib comes with the first one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.reports.history import read_history
from launch.watching.trackers.config import Images
from launch.watching.trackers.tracker import Pixels
from launch.watching.watch import Watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pixels(figure: Figure) -> Pixels:
    """A figure, drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def note_spectra(watch: Watch, run_dir: Path) -> None:
    """Show singular values and ranks so far, if the tracker wants them at each measurement."""
    if watch.tracker.images is Images.restarts:
        from launch.reports.figures import rank_figure, spectra_figure

        history = read_history(run_dir)
        watch.tracker.figures({"spectra": pixels(spectra_figure(history)), "rank": pixels(rank_figure(history))})
