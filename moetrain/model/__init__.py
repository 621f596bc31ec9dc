"""F2: the decoder-only GPT with Mixture-of-Experts blocks. Knows no rank, no file, no sink."""
