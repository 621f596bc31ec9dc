"""F1: pure decisions: which token goes to which expert, what is dropped, where an expert lives."""
