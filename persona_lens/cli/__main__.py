"""`python -m persona_lens.cli`."""

from persona_lens.cli import main

main()
