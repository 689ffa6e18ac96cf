"""What lies between stages: the columns of their files, and the settings of a recipe."""
