"""The user interface of the scripts: flags, tables, progress, pages."""
