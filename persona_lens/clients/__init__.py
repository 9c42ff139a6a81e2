"""LLM servers that speak OpenAI's chat completions: many calls at a time, no answer paid for twice."""
