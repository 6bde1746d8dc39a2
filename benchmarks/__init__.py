"""What is fast, measured: ratios within one run, so that they mean something on any machine."""
