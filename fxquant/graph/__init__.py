"""The graph: capture, matching, regions, equivalence, rewriting and folding of FX graphs in pre-dispatch ATen."""
