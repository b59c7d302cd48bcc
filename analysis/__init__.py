"""Tables and plots from result files, and from nothing else: no number is typed by hand or parsed from a log."""
