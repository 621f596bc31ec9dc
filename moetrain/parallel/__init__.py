"""F3: plans, placement on ranks, and the engines that step a sharded model."""
