"""Persona vectors as values: their algebra, projections, files and statistics, and the models they may be used with."""
