"""The workshop behind the scripts: one idea a file, layers as in docs/architecture.md."""
