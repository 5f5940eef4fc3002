"""What a person types and reads: flags, tables, progress, pages."""
