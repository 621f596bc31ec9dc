"""F1: bytes that last: Zarr v3 objects, the manifest that commits them, the bundle layout. No torch at import."""
