"""What accelerates a pipeline, as plain functions of the pipeline and its settings.

Each file stands alone: it imports torch, diffusers, an acceleration library and the standard
library, and from this package nothing but `shared`. `accelsearch.methods` calls these functions,
and generated scripts hold the source of those that they need, so that what was measured is what
runs. For both, a name at the top level is used in one file only.
"""
