"""A picture of spectra."""

from collections.abc import Sequence
from io import BytesIO

from fused_lora.analysis.report import Row


def plot(rows: Sequence[Row]) -> bytes:
    """A PNG: for each kind of layer, by the last part of its name, each layer's singular values, from the first layer
    (dark) to the last (light)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.name.rpartition(".")[2], []).append(row)
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    size = (3.2 * columns, 2.6 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, (kind, members) in zip(axes.flat, kinds.items()):
        for depth, row in enumerate(members):
            values = row.spectrum[row.spectrum > 1e-9 * row.spectrum.max()].tolist()
            colour = pyplot.get_cmap("viridis")(depth / max(1, len(members) - 1))
            axis.semilogy(range(1, len(values) + 1), values, color=colour, linewidth=1)
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_visible(False)
    figure.supxlabel("number")
    figure.supylabel("singular value of the update")
    image = BytesIO()
    figure.savefig(image, dpi=130, format="png")
    pyplot.close(figure)
    return image.getvalue()
