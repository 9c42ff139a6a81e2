"""One script for each library that is compared, run in that library's own environment; see `benchmarks.peers`.

Each reads the residual stream of the last token of every row at all layers, in the way that the library's users would.
"""
