"""The paper's tables with one command: a preset composes the pipeline and the experiments into stages that resume.

Extraction, layer selection, dose-response, monitoring, cosines, finetuning on a grid of sets, projection differences,
and preventative steering against post-hoc steering and CAFT (arXiv:2507.21509); planned and costed before anything
runs, and reported beside the paper's numbers. Each stage is a function of the library that can be called alone.
"""
