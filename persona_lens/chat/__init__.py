"""Messages to token ids: the one place where text becomes tokens, and where turns end."""
