"""F2: AdamW with a step per expert, schedules, clipping."""
