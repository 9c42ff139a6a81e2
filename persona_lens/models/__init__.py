"""The only place that knows TransformerLens: loading, hook points, and forward passes without what is not needed.

`HookedTransformer` (transformer-lens 3.9) and `TransformerBridge` (3.9 and 4.x) stand behind the same functions.
Knows nothing about traits, vectors or chats.
"""
