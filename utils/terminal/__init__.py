"""What people type and read: flags, tables, progress, pages."""
