"""F1: what a run shows: metrics, sinks, expert load, plots."""
