"""F1: tokenizers and chat templates. No torch."""
