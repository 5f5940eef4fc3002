"""The configuration: every setting, and where its value came from."""
