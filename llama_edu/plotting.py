"""One look for every figure of the lessons and of the report: readable in print, safe for colour-blind readers."""

# Okabe and Ito's palette: eight colours that stay apart under every common form of colour-blindness.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
# The order in which lines are drawn: the strongest contrasts first, yellow (weak on white) never.
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)


def use_style() -> None:
    """Set matplotlib's defaults for a lesson. Called once, in the cell of the imports."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "figure.figsize": (7.2, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 110,
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=CYCLE),
            "image.cmap": "cividis",
        }
    )
