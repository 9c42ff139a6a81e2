"""The decode loop, its sampling, and the activations captured while it runs."""
