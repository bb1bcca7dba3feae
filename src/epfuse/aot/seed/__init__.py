"""The tile of InferenceX pull request 1782, rebuilt from its description, to be compiled beside this package's own."""
