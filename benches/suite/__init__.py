"""The benchmark runner: starts backends, interleaves load, takes medians, writes the report.

Python's standard library only. `scripts/bench` is the way in.
"""
