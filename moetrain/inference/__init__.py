"""F4: the runtime that serves a bundle. Imports routing, model, store, text only."""
