"""Research around the library: the study, benchmarks and fault injection; not in the wheel."""
