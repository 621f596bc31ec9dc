"""F3: partial expert checkpoints: what is saved when, by whom, and how it comes back."""
