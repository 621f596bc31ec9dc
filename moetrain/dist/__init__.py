"""F1: processes: the world, its mesh of axes, the one all-to-all, stopping together."""
