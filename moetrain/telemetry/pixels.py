"""Figures as pixels, for dashboards. Without pyplot, which takes half a second to import and keeps figures."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def get_ready() -> None:
    """Draws something, so that modules and fonts are loaded before the first step and not in the middle of training."""
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(np.eye(2)), ax=axes)
    axes.set_title("0")
    pixels(figure)
