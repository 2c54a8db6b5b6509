def draw_ceiling(ax, value):
    return ax.axvline(value, linestyle="--", color=COLOURS["ceiling"])
