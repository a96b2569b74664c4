"""Pictures for trackers while a run goes on; launch/reports/ draws them."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.reports.figures import rank_figure, spectra_figure
from launch.reports.history import read_history
from launch.watching.trackers.config import Images
from launch.watching.trackers.tracker import Pixels
from launch.watching.watch import Watch


def pixels(figure: Figure) -> Pixels:
    """A figure, drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def note_spectra(watch: Watch, run_dir: Path) -> None:
    """Show singular values and ranks so far, if the tracker wants them at each measurement."""
    if watch.tracker.images is Images.restarts:
        history = read_history(run_dir)
        watch.tracker.figures({"spectra": pixels(spectra_figure(history)), "rank": pixels(rank_figure(history))})
