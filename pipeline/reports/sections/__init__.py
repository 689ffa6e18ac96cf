"""What the report is made of, a section a module."""
