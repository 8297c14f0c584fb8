"""The benchmarks: one `bench_<operation>.py` each, found by its name; `fastcap bench` runs them.

An operation joins with one file that defines OPERATION, SHAPES and cases(settings) -> [Case] (see `harness`), and the
function bench_<operation> for pytest. Everything else here serves all of them.
"""
