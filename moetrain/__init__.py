"""moetrain: train Mixture-of-Experts language models, keep them safe, serve them. Importing it imports no torch."""

__version__ = "0.1.0"
