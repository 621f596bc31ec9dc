"""F2: text to Megatron .bin/.idx, and batches out of them."""
