"""F4: bundles and Hugging Face folders, both ways."""
