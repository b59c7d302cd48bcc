"""The harness: one config in, one result file out, the same way for every method (``run.execute``)."""
