"""The paper's experiments as functions: each samples, judges and measures, and gives numbers with their intervals."""
