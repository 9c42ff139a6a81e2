"""Finetuning with interventions in training: preventative steering, CAFT, preventative prompts, a penalty."""
