"""Interventions on the residual stream: values that say what to do, and contexts that attach them to a model."""
