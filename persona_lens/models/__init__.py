"""The only room that knows TransformerLens: loading, hook points, forward passes, the key-value cache and adapters."""
