"""Other people's LLM servers: asked many at a time, what they answered kept, and nothing paid for twice.

The only part that knows how to reach a server; it knows nothing about traits, judges or the model under study.
"""
